"""Look at a checkpoint before it is converted: what each layer becomes, and what is wrong.

All but the packed weights is read (about 5% of the bytes). A packed weight cannot be wrong: each of
the 2^32 values of a word is valid. So what is refused at all is refused here, before anything is
written. It is read again when it is converted: keeping it would take memory that grows with the
model, for the 4 to 9% of a conversion's time that looking at it takes (1 GB, two cores). Only where
2:4 sparse layers are asked for, weights are read, too, to find which can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import DTYPE_NAMES
from marlin.formats.errors import Refusal
from marlin.formats.native import PackedShape
from marlin.formats.packed import SYMMETRIC_ZERO, Parameters, operands
from marlin.formats.shards import Entry
from marlin.formats.source import SourceFormat, SourceLayer, collected
from marlin.formats.sparse import order_problem, sparsity_problem, used_codes

REQUIRE_OPTION = "--sparse in place of --require-sparse leaves such layers dense"


@dataclass(frozen=True)
class Layer:
    """A quantized layer, and what it becomes; ``dtype`` is that of its scales then.

    ``only_zero`` is the one value that all of its zero points have, or None. ``sparse``: it becomes
    2:4 sparse; ``dense_reason``: why it does not though it was asked for.
    """

    source: SourceLayer
    dtype: torch.dtype
    zeros: bool
    act_order: bool
    bias: bool
    bytes_before: int
    only_zero: int | None
    sparse: bool = False
    dense_reason: str = ""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> PackedShape:
        source = self.source
        return PackedShape(source.in_features, source.out_features, source.group_size, self.sparse)

    def entries(self) -> list[Entry]:
        """The tensors to be written for this layer."""
        k, n, groups = self.source.in_features, self.source.out_features, self.source.groups
        rules = operands(k, n, groups, self.dtype, sparse=self.sparse)
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

    source: SourceFormat
    layers: dict[str, Layer]
    others: list[str]
    warnings: list[str]


def _modules(checkpoint: Checkpoint, source: SourceFormat) -> dict[str, list[str]]:
    """Quantized modules in reading order, with the leaf names of all their tensors."""
    children: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        children.setdefault(module, []).append(leaf)
    return {
        module: leaves
        for module, leaves in children.items()
        if any(marker in leaves for marker in source.markers)
    }


def _layer(
    checkpoint: Checkpoint, source: SourceFormat, name: str, leaves: list[str]
) -> SourceLayer:
    if not name:
        raise CheckpointError(
            f"{', '.join(leaves)} belong to no named module; prefix them with one"
        )
    return source.layer(checkpoint, name, leaves)


def quantized_layers(checkpoint: Checkpoint, source: SourceFormat) -> dict[str, SourceLayer]:
    """Every quantized layer in reading order; no values are read.

    Raises :class:`CheckpointError` with all that is wrong with their tensors' dtypes and shapes.
    """
    problems: list[str] = []
    layers: dict[str, SourceLayer] = {}
    for name, leaves in _modules(checkpoint, source).items():
        with collected(problems):
            layers[name] = _layer(checkpoint, source, name, leaves)
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    return layers


def _examine_layer(
    checkpoint: Checkpoint,
    source: SourceFormat,
    name: str,
    leaves: list[str],
    dtype: torch.dtype | None,
    sparse: bool,
    warnings: list[str],
) -> Layer:
    layer = _layer(checkpoint, source, name, leaves)
    rest = layer.parameters(dtype)
    warning = layer.warning(rest)
    if warning:
        warnings.append(warning)
    dense_reason = _dense_reason(layer, rest) if sparse else ""
    return Layer(
        source=layer,
        dtype=rest.scales.dtype,
        zeros=rest.zeros is not None,
        act_order=rest.perm is not None,
        bias=rest.bias is not None,
        bytes_before=sum(checkpoint.tensors[f"{name}.{leaf}"].nbytes for leaf in leaves),
        only_zero=_only_value(rest.zeros),
        sparse=layer.sparse or (sparse and not dense_reason),
        dense_reason=dense_reason,
    )


def _dense_reason(layer: SourceLayer, rest: Parameters) -> str:
    """Why a layer cannot be stored 2:4 sparse, or nothing."""
    if layer.sparse:
        return ""
    return order_problem(rest.perm) or sparsity_problem(used_codes(layer.codes(), rest.zeros))


def _only_value(zeros: Tensor | None) -> int | None:
    if zeros is None:
        return SYMMETRIC_ZERO
    first = int(zeros[0, 0])
    return first if bool((zeros == first).all()) else None


def survey(
    checkpoint: Checkpoint,
    source: SourceFormat,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda name: None,
    sparse: bool = False,
    require_sparse: bool = False,
) -> Survey:
    """Examine every layer of a checkpoint, as its format ``source`` has them.

    ``sparse`` asks for 2:4 sparse layers where the weights allow it, ``require_sparse`` everywhere.

    ``dtype`` (float16 or bfloat16) is wanted for scales and biases; None keeps theirs. ``progress``
    is called with the name of each layer done. Raises :class:`CheckpointError` with everything that
    is wrong, in all layers.
    """
    problems: list[str] = []
    warnings: list[str] = []
    layers: dict[str, Layer] = {}
    modules = _modules(checkpoint, source)
    for name, leaves in modules.items():
        with collected(problems):
            layers[name] = _examine_layer(checkpoint, source, name, leaves, dtype, sparse, warnings)
        progress(name)
    if require_sparse:
        problems += [
            Refusal(f"{name}: {layer.dense_reason}", option=REQUIRE_OPTION)
            for name, layer in layers.items()
            if layer.dense_reason
        ]
    wrong_format = source.checkpoint_problem(
        (layer.source, layer.only_zero) for layer in layers.values()
    )
    if wrong_format:
        problems.append(wrong_format)
    if not modules:
        problems.append(
            f"no quantized layer: no tensor is called <module>.{source.markers[0]}, as the format "
            f"{source.name} has it"
        )
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    others = [name for name in checkpoint.tensors if name.rpartition(".")[0] not in modules]
    return Survey(source, layers, others, warnings)
