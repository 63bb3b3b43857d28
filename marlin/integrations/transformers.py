"""Converted checkpoints in Hugging Face transformers.

After ``import marlin.integrations.transformers``, ``from_pretrained`` loads what ``marlin convert``
wrote, and ``save_pretrained`` writes it again::

    import marlin.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("DST", device_map="cuda")

The layers that ``config.json`` lists become :class:`marlin.MarlinLinear`, or
:class:`marlin.MarlinLinear24` where they are 2:4 sparse. transformers reads the tensors, one after
the other, straight to their devices.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.native import packed_modules
from marlin.formats.packed import COMPUTE_DTYPES
from marlin.integrations._placeholders import (
    check_checkpoint,
    finish_layers,
    names_in_model,
    open_files,
    place_empty_layers,
)

# Before it, a quantizer is not told which files are loaded, and so not which layers have zero
# points, an order or a bias.
LEAST_VERSION = 5

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"marlin.integrations.transformers needs transformers >= {LEAST_VERSION}.0, and it cannot "
        f"be imported ({error}): pip install 'marlin[transformers]'"
    ) from error
if int(transformers.__version__.partition(".")[0]) < LEAST_VERSION:
    raise ImportError(
        f"marlin.integrations.transformers needs transformers >= {LEAST_VERSION}.0, found "
        f"{transformers.__version__}: pip install -U transformers, or use marlin.load"
    )

from transformers.quantizers.auto import (  # noqa: E402
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "marlin"


def _offloads_integers() -> bool:
    """Whether tensors come back from the disk in their own dtypes, not all in the model's."""
    from transformers.integrations.accelerate import accelerate_disk_offload

    return "dtype" not in inspect.signature(accelerate_disk_offload).parameters


@register_quantization_config(METHOD)
class MarlinConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a converted checkpoint: ``In a checkpoint``, csrc/README.md.

    Attributes:
        quant_method: ``"marlin"``.
        format_version: 1, or 2 if a layer is 2:4 sparse.
        bits: 4.
        modules: module name -> ``in_features``, ``out_features``, ``group_size``, ``sparsity``.
    """

    quant_method: Any  # transformers has an enum of its own methods here, and takes others' names

    def __init__(self, **entries: Any) -> None:
        """Take the entries as they are in ``config.json``.

        Raises:
            CheckpointError: they are malformed, of another version, or of the original Marlin.
        """
        packed_modules({"quantization_config": {"quant_method": METHOD, **entries}})
        self.quant_method = METHOD
        self.format_version: int = entries["format_version"]
        self.bits: int = entries["bits"]
        self.modules: dict[str, dict[str, Any]] = copy.deepcopy(dict(entries["modules"]))


@register_quantizer(METHOD)
class MarlinQuantizer(HfQuantizer):
    """Replaces the listed modules before transformers loads their tensors."""

    requires_calibration = True
    quantization_config: MarlinConfig

    def __init__(self, quantization_config: MarlinConfig, **kwargs: Any) -> None:
        """Called by ``from_pretrained``.

        Raises:
            ValueError: the checkpoint is not a converted one.
        """
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "quantization_config: got a MarlinConfig for a checkpoint that is not converted; "
                "it cannot quantise while loading: run `marlin convert` on a quantised checkpoint, "
                "or marlin.replace_linear(model) on the loaded model"
            )
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float16
        self._names: list[str] = []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the model, which is that of activations and scales.

        Raises:
            TypeError: it is neither fp16 nor bf16.
        """
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"dtype: got {dtype}, passed to from_pretrained or in config.json; scales and "
                "activations are torch.float16 or torch.bfloat16; pass dtype=torch.float16 or "
                "dtype=torch.bfloat16"
            )
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "from_pretrained was given a state_dict, which does not say what its layers have: "
                "give the folder of a converted checkpoint, or use model.load_state_dict"
            )
        config = self.quantization_config
        # transformers builds the model in a context where new tensors are on the meta device.
        with torch.device("cpu"):
            checkpoint = open_files(checkpoint_files, config.to_dict())
            modules = check_checkpoint(checkpoint, self._dtype)
        names = names_in_model(model, modules, model.base_model_prefix)
        ties = model.all_tied_weights_keys
        tied = {*ties.keys(), *ties.values()}
        place_empty_layers(model, checkpoint, modules, names, tied, self._dtype)
        self._names = list(names.values())
        # As save_pretrained will write them: by the names of the model's own tensors.
        config.modules = {names[name]: entry for name, entry in config.modules.items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        finish_layers(model, self._names, self._dtype)
        offloaded = [name for name in self._names if model.get_submodule(name).scales.is_meta]
        if offloaded and not _offloads_integers():
            raise RuntimeError(
                f"{offloaded[0]}: offloaded, and transformers {transformers.__version__} reads "
                "integers back from the disk as floats: update transformers, or leave out "
                "offload_buffers=True"
            )

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the tensors as they are, and this configuration."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients of activations pass the frozen layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are made for ``torch.compile(fullgraph=True)``."""
        return True
