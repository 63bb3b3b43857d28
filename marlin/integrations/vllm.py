"""Converted checkpoints in vLLM.

Where marlin and vLLM are installed together, ``vllm serve DST`` and ``LLM("DST")`` run what
``marlin convert`` wrote, dense and 2:4 sparse, on any number of tensor-parallel ranks. vLLM finds
this module by its entry point in the group ``vllm.general_plugins`` and calls :func:`register`, in
every process.

The method's name is ``marlin``, as the checkpoints say. vLLM leaves it free: its own kernels of
that name are called by the formats that they read (``auto_gptq``, ``auto_awq``). These stay vLLM's,
no method is overridden. Checkpoints of the original Marlin have the same name; they are refused
with the reason.

Left out, and refused by name if a checkpoint has them in 4 bits: the output layer (``lm_head``) and
experts of mixture-of-experts layers. Nothing here has been run on a GPU yet; on CPUs LoRA adapters
and the update of weights while serving have not been tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import get_safetensors_params_metadata

from marlin._inductor import kernels_leave_waits_out
from marlin._linear_checks import check_operands
from marlin._part import BLOCK
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.container import TensorInfo
from marlin.formats.native import LEAVES, PackedShape, check_packed_tensors, packed_modules
from marlin.formats.packed import COMPUTE_DTYPES
from marlin.integrations._vllm_parameters import Fusion, make_parameter, without_gaps

METHOD = "marlin"
EXPERTS = ("RoutedExperts", "FusedMoE")  # vLLM's layers of many linear ones; the name has changed
OPERANDS = {  # of torch.ops.marlin.gemm and gemm_24, for a layer that is sparse or not
    False: ("qweight", "scales", "zeros", "perm"),
    True: ("qweight", "places", "scales", "zeros"),
}


class MarlinConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a converted checkpoint: ``In a checkpoint``, csrc/README.md.

    Attributes:
        modules: sizes of the packed layers, by name.
        leaves: the tensors that each of them has, by name.
    """

    def __init__(self, modules: dict[str, PackedShape]) -> None:
        super().__init__()
        self.modules = modules
        self.leaves: dict[str, set[str]] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MarlinConfig:
        """Called by vLLM.

        Raises:
            CheckpointError: it is malformed, of another version, or of the original Marlin.
        """
        return cls(packed_modules({"quantization_config": config}))

    @staticmethod
    def get_name() -> str:
        return METHOD

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return list(COMPUTE_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Learn from the headers of the files what the layers have, and check it; by vLLM.

        Raises:
            CheckpointError: a tensor is missing, unlisted, or of another dtype or shape.
        """
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        tensors = {
            name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]), Path(), 0, 0)
            for name, entry in headers.items()
            if name != "__metadata__"
        }
        check_packed_tensors(Checkpoint(Path(model_name), {}, None, tensors), self.modules)
        self.leaves = {
            name: {leaf for leaf in LEAVES if f"{name}.{leaf}" in tensors} for name in self.modules
        }

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM's model calls them; by vLLM."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        self.leaves = hf_to_vllm_mapper.apply_dict(self.leaves)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """How ``layer``, of the name ``prefix``, is multiplied; called by vLLM.

        Raises:
            ValueError: the checkpoint has it in 4 bits and it is not a linear layer, or it is fused
                of layers of which only some are in 4 bits.
        """
        start, _, leaf = prefix.rpartition(".")
        fused = [f"{start}.{part}" for part in self.packed_modules_mapping.get(leaf, [])]
        names = [prefix] if prefix in self.modules or not fused else fused
        packed = [name for name in names if name in self.modules]
        if not isinstance(layer, LinearBase):
            if any(base.__name__ in EXPERTS for base in type(layer).__mro__):
                packed += [name for name in self.modules if name.startswith(f"{prefix}.")]
            if packed:
                raise ValueError(
                    f"{prefix}: the checkpoint has {packed[0]} in 4 bits, and in vLLM marlin "
                    f"multiplies linear layers only, not {type(layer).__name__}; convert a model "
                    "with this layer left unquantised"
                )
            return None
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(names):
            raise ValueError(
                f"{prefix}: the checkpoint has {', '.join(packed)} in 4 bits, but not "
                f"{', '.join(name for name in names if name not in packed)}, and vLLM multiplies "
                "them as one; quantise all of them or none"
            )
        return MarlinLinearMethod(self, packed)


class MarlinLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Makes, loads and multiplies the packed weight of one of vLLM's linear layers.

    The kernels may fetch weights early (``static_weights``): nothing must write them while a
    multiplication right before or after is under way.
    """

    def __init__(self, config: MarlinConfig, modules: list[str]) -> None:
        """For one layer of vLLM's, which ``modules`` of the checkpoint are fused to."""
        self.config, self.modules = config, modules
        self.sparse = config.modules[modules[0]].sparse
        self.lead = 0
        self.orders_input = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give ``layer`` its parameters, for the part of the weight that its rank has; by vLLM.

        Raises:
            ValueError: the sizes of the checkpoint and the model differ, or the layers that are
                fused differ in more than their output features.
        """
        rank, ranks = cast(int, layer.tp_rank), cast(int, layer.tp_size)
        split = input_size_per_partition < input_size
        first = rank * input_size_per_partition if split else 0
        fusion = Fusion(
            getattr(layer, "prefix", "") or self.modules[0],
            {name: self.config.modules[name] for name in self.modules},
            list(output_partition_sizes),
            range(first, first + input_size_per_partition),
            params_dtype,
        )
        self.orders_input = split and any(self._has("perm"))
        self._check_fusion(fusion, input_size, ranks)
        self.fusion, self.lead = fusion, fusion.part.lead
        loader = extra["weight_loader"]
        if isinstance(layer, ReplicatedLinear):  # its own copies tensors as they are
            loader = _load_whole
        for leaf in self._leaves():
            layer.register_parameter(leaf, make_parameter(leaf, fusion, loader))

    def _has(self, leaf: str) -> list[bool]:
        """Which of the checkpoint's layers have a tensor."""
        return [leaf in self.config.leaves[name] for name in self.modules]

    def _leaves(self) -> list[str]:
        """The tensors of the weight that any of them has."""
        return [leaf for leaf in LEAVES if leaf != "bias" and any(self._has(leaf))]

    def _check_fusion(self, fusion: Fusion, input_size: int, ranks: int) -> None:
        name, shapes = fusion.name, list(fusion.modules.values())
        kinds = {(shape.group_size, shape.sparse) for shape in shapes}
        if len(kinds) > 1 or len(set(self._has("perm"))) > 1:
            raise ValueError(
                f"{name}: {', '.join(self.modules)} differ in group size, sparsity or act-order, "
                "and vLLM multiplies them as one; quantise them alike"
            )
        outputs = [shape.out_features for shape in shapes]
        if len(shapes) == 1:
            # Of a layer that is stored fused vLLM cuts the tensors at blocks.
            fits = sum(fusion.sizes) * ranks >= outputs[0]
            if len(fusion.sizes) > 1 and any(size % BLOCK for size in fusion.sizes):
                raise ValueError(
                    f"{name}: stored as one layer, whose parts have {fusion.sizes} output features "
                    f"on a rank; each must be a multiple of {BLOCK}; use fewer ranks"
                )
        else:
            pairs = zip(fusion.sizes, outputs, strict=True)
            fits = all(size * ranks >= output for size, output in pairs)
        if fusion.shape.in_features != input_size or not fits:
            raise ValueError(
                f"{name}: the model's layer is {input_size} -> {fusion.sizes} features on each of "
                f"{ranks} ranks, the checkpoint's {fusion.shape.in_features} -> {outputs}; the "
                "checkpoint is of another model"
            )
        if self.orders_input and ranks != get_tensor_model_parallel_world_size():
            raise ValueError(
                f"{name}: has act-order and is split among {ranks} of the tensor-parallel ranks, "
                "which its input cannot be gathered from; quantise with desc_act=False"
            )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what has been loaded and make it fit for the kernels; called by vLLM.

        Raises:
            ValueError: a tensor was not loaded, holds what no kernel could use, or has a bias that
                the model has not.
        """
        fusion = self.fusion
        leaves = self._leaves()
        fusion.check_complete({leaf: self._has(leaf) for leaf in leaves})
        if fusion.loaded and any(self._has("bias")) != (layer.bias is not None):
            model, checkpoint = ("a", "none") if layer.bias is not None else ("no", "one")
            raise ValueError(
                f"{fusion.name}: the model's layer has {model} bias, the checkpoint has "
                f"{checkpoint} for it; the checkpoint is of another model"
            )
        for leaf in leaves:
            tensor = getattr(layer, leaf).data
            if leaf in ("qweight", "places"):
                tensor = without_gaps(leaf, tensor, fusion)
            layer.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        tensors = dict(zip(OPERANDS[self.sparse], self._operands(layer), strict=True))
        k, n = fusion.part.shape.in_features, sum(fusion.sizes)
        try:
            check_operands({"perm": None, "bias": None, **tensors}, k, n, sparse=self.sparse)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{fusion.name}.{error}") from error

    def _operands(self, layer: nn.Module) -> list[Tensor | None]:
        """What the op takes after the input."""
        found = [getattr(layer, leaf, None) for leaf in OPERANDS[self.sparse]]
        return [*found[:-1], None] if self.orders_input else found

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K of the rank]`` -> ``[..., N of the rank]``; called by vLLM."""
        if self.orders_input:  # the rank's columns multiply input features of all ranks
            x = tensor_model_parallel_all_gather(x).index_select(-1, cast(Tensor, layer.perm))
        if self.lead:
            x = F.pad(x, (self.lead, 0))
        op = torch.ops.marlin.gemm_24 if self.sparse else torch.ops.marlin.gemm
        static = not (torch.compiler.is_compiling() and kernels_leave_waits_out())
        output: Tensor = op(x, *self._operands(layer), bias, static_weights=static)
        return output


def _load_whole(parameter: Any, loaded: Tensor) -> None:
    parameter.load_row_parallel_weight(loaded)


def register() -> None:
    """Make the method known to vLLM, which calls this when it starts; twice does no harm."""
    register_quantization_config(METHOD)(MarlinConfig)
    name = MarlinLinearMethod.__name__
    if name not in WEIGHT_LOADER_V2_SUPPORTED:
        WEIGHT_LOADER_V2_SUPPORTED.append(name)
