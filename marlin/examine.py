"""Look at a GPTQ checkpoint before it is converted: what each layer becomes, and what is wrong.

All but the packed weights is read (about 5% of the bytes). A packed weight cannot be wrong: each of
its 2^32 words is valid. So what is refused at all is refused here, before anything is written. Only
where 2:4 sparse layers are asked for, weights are read, too, to find which can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import DTYPE_NAMES
from marlin.formats.errors import Refusal
from marlin.formats.gptq import (
    GptqSettings,
    Parameters,
    TensorSpec,
    layout_problems,
    parse_gptq_config,
    read_parameters,
    unpack_weight,
    zeros_are_ambiguous,
)
from marlin.formats.packed import SYMMETRIC_ZERO, group_count, operands
from marlin.formats.shards import Entry
from marlin.formats.sparse import order_problem, sparsity_problem, used_codes

LEAVES = ("qweight", "qzeros", "scales", "g_idx", "bias")
MARKERS = ("qweight", "qzeros", "g_idx")  # leaf names that only a quantized layer has
REQUIRE_OPTION = "--sparse in place of --require-sparse leaves such layers dense"


@dataclass(frozen=True)
class Layer:
    """A quantized layer, and what it becomes; ``dtype`` is that of its scales then.

    ``only_zero`` is the one value that all of its zero points have, or None. ``sparse``: it becomes
    2:4 sparse; ``dense_reason``: why it does not though it was asked for.
    """

    name: str
    in_features: int
    out_features: int
    settings: GptqSettings
    dtype: torch.dtype
    zeros: bool
    act_order: bool
    bias: bool
    bytes_before: int
    only_zero: int | None
    sparse: bool = False
    dense_reason: str = ""

    def entries(self) -> list[Entry]:
        """The tensors to be written for this layer."""
        groups = group_count(self.in_features, self.settings.group_size)
        rules = operands(
            self.in_features, self.out_features, groups, self.dtype, sparse=self.sparse
        )
        optional = {"zeros": self.zeros, "perm": self.act_order, "bias": self.bias}
        return [
            Entry(f"{self.name}.{leaf}", DTYPE_NAMES[dtype], shape)
            for leaf, (dtype, shape) in rules.items()
            if optional.get(leaf, True)
        ]

    @property
    def bytes_after(self) -> int:
        return sum(entry.nbytes for entry in self.entries())


@dataclass(frozen=True)
class Survey:
    """Layers in reading order, the names of all other tensors, and what the user should know."""

    layers: dict[str, Layer]
    others: list[str]
    warnings: list[str]


def layer_parameters(
    checkpoint: Checkpoint, name: str, settings: GptqSettings, dtype: torch.dtype | None
) -> Parameters:
    """Read and decode all of a layer but its packed weight."""
    has_bias = f"{name}.bias" in checkpoint.tensors
    return read_parameters(
        name,
        checkpoint.read(f"{name}.qzeros"),
        checkpoint.read(f"{name}.scales"),
        checkpoint.read(f"{name}.g_idx"),
        checkpoint.read(f"{name}.bias") if has_bias else None,
        settings,
        dtype,
    )


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Quantized modules in reading order: module -> leaf -> tensor name, for all its tensors."""
    children: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        children.setdefault(module, {})[leaf] = name
    return {
        module: leaves
        for module, leaves in children.items()
        if any(marker in leaves for marker in MARKERS)
    }


def _examine_layer(
    checkpoint: Checkpoint,
    name: str,
    leaves: dict[str, str],
    settings: GptqSettings | None,
    dtype: torch.dtype | None,
    sparse: bool,
    warnings: list[str],
) -> Layer:
    if not name:
        raise CheckpointError(
            f"{', '.join(leaves)} belong to no named module; prefix them with one"
        )
    if settings is None:
        raise CheckpointError(
            f"{name}: the config's dynamic excludes it, but it has {', '.join(leaves)}"
        )
    problems = [
        f"{name}: {leaf} beside {', '.join(m for m in MARKERS if m in leaves)}: a quantized linear "
        f"layer has only {', '.join(LEAVES)}"
        for leaf in leaves
        if leaf not in LEAVES
    ]
    infos = {leaf: checkpoint.tensors[tensor] for leaf, tensor in leaves.items() if leaf in LEAVES}
    specs = {leaf: TensorSpec(info.torch_dtype, info.shape) for leaf, info in infos.items()}
    problems += layout_problems(name, specs, settings)
    if problems:
        raise CheckpointError(problems)
    rest = layer_parameters(checkpoint, name, settings, dtype)
    if rest.zeros is not None and zeros_are_ambiguous(checkpoint.read(f"{name}.qzeros"), settings):
        warnings.append(
            f"{name}: zero points of 0 in checkpoint_format gptq: tools differ on how they are "
            "stored; they are read nibble by nibble (GPTQModel's carry, and are read so when the "
            "config's meta.quantizer names it)"
        )
    words, n = specs["qweight"].shape
    dense_reason = _dense_reason(checkpoint, name, rest) if sparse else ""
    return Layer(
        name=name,
        in_features=8 * words,
        out_features=n,
        settings=settings,
        dtype=rest.scales.dtype,
        zeros=rest.zeros is not None,
        act_order=rest.perm is not None,
        bias=rest.bias is not None,
        bytes_before=sum(info.nbytes for info in infos.values()),
        only_zero=_only_value(rest.zeros),
        sparse=sparse and not dense_reason,
        dense_reason=dense_reason,
    )


def _dense_reason(checkpoint: Checkpoint, name: str, rest: Parameters) -> str:
    """Why a layer cannot be stored 2:4 sparse, or nothing."""
    problem = order_problem(rest.perm)
    if problem:
        return problem
    return sparsity_problem(
        used_codes(unpack_weight(checkpoint.read(f"{name}.qweight")), rest.zeros)
    )


def _only_value(zeros: Tensor | None) -> int | None:
    if zeros is None:
        return SYMMETRIC_ZERO
    first = int(zeros[0, 0])
    return first if bool((zeros == first).all()) else None


def _format_problem(layers: Iterable[Layer]) -> str | None:
    """Symmetric zero points read as the other checkpoint_format are all one off 8.

    No asymmetric layer has one zero point everywhere, let alone every layer of a checkpoint.
    """
    for version, off, right in (
        (1, SYMMETRIC_ZERO + 1, "gptq_v2"),
        (2, SYMMETRIC_ZERO - 1, "gptq"),
    ):
        found = {(layer.settings.zeros_version, layer.only_zero) for layer in layers}
        if found == {(version, off)}:
            return (
                f"checkpoint_format: every zero point of the checkpoint is {off} as the config has "
                f"it, and 8, symmetric, with checkpoint_format {right!r}; that is probably what it "
                f"is: set checkpoint_format to {right!r} in the config"
            )
    return None


def survey(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda name: None,
    sparse: bool = False,
    require_sparse: bool = False,
) -> Survey:
    """Examine every layer of a GPTQ checkpoint.

    ``sparse`` asks for 2:4 sparse layers where the weights allow it, ``require_sparse`` everywhere.

    ``dtype`` (float16 or bfloat16) is wanted for scales and biases; None keeps theirs. ``progress``
    is called with the name of each layer done. Raises :class:`CheckpointError` with everything that
    is wrong, in all layers.
    """
    config = parse_gptq_config(checkpoint.config, checkpoint.quantize_config)
    problems: list[str] = []
    warnings: list[str] = []
    layers: dict[str, Layer] = {}
    modules = _modules(checkpoint)
    for name, leaves in modules.items():
        try:
            layers[name] = _examine_layer(
                checkpoint, name, leaves, config.settings(name), dtype, sparse, warnings
            )
        except CheckpointError as error:
            problems += error.refusals
        progress(name)
    if require_sparse:
        problems += [
            Refusal(f"{name}: {layer.dense_reason}", option=REQUIRE_OPTION)
            for name, layer in layers.items()
            if layer.dense_reason
        ]
    wrong_format = _format_problem(layers.values())
    if wrong_format:
        problems.append(wrong_format)
    if not modules:
        problems.append("no quantized layer: no tensor is called <module>.qweight")
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    taken = {tensor for leaves in modules.values() for tensor in leaves.values()}
    return Survey(layers, [name for name in checkpoint.tensors if name not in taken], warnings)
