"""Tensor parallelism: packed layers whose features are shared out among the ranks of a group.

As usual (Megatron-LM, arXiv 1909.08053), a layer that is split by its output features, ``Column``,
feeds one that is split by its input features, ``Row``, whose partial results are added up::

    plan = {
        "q_proj": Column(), "k_proj": Column(), "v_proj": Column(), "o_proj": Row(),
        "gate_proj": Column(), "up_proj": Column(), "down_proj": Row(),
    }
    model = marlin.parallel.load(model, "DST", plan, device=f"cuda:{rank}")

Packed tensors are cut exactly, between any two features. ``Column`` computes the sums that the
whole layer does, in fp32, maybe in another order. ``Row`` rounds more: every rank's partial result
once to the activations' dtype, as does every addition of the all-reduce. With R ranks, u the unit
roundoff (2^-11 in fp16, 2^-8 in bf16) and S the sum of the absolute values of the partial results,
an output differs from the whole layer's by at most R u S, and by what the order of fp32 sums does.
A part may get another kernel than the whole layer; some round weights to the activations' dtype, as
the table in README.md says.

A state dict holds a rank's parts, and is for ranks that share the layers out alike; the model's
``save_pretrained``, if it has one, is refused. Gradients of activations pass through. Attention
needs whole heads: where ranks do not divide them, give
``bounds=split(features, ranks, multiple=head_size)``. A layer that is fused of several, such as
``qkv_proj``, is shared out as one, which models that take its output apart do not expect; those
that have them apart can have every rank's parts of them fused, by :func:`marlin.fuse` afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from marlin._packed_linear import PackedLinear
from marlin._parallel_linear import (
    FUSED,
    Column,
    ColumnParallelMarlinLinear,
    FusedColumns,
    ParallelLinear,
    Read,
    Row,
    RowParallelMarlinLinear,
    Share,
    layer_of,
    reader,
    refuse_to_save,
    shape_of,
    split,
)
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.native import (
    CHECKED,
    LEAVES,
    PackedShape,
    check_values,
    packed_modules,
)
from marlin.fused_linear import FusedLinear
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.load import check_layer, fill, packed_layer
from marlin.replace import matches, reason_to_keep

__all__ = [
    "Column",
    "ColumnParallelMarlinLinear",
    "Row",
    "RowParallelMarlinLinear",
    "load",
    "parallelize",
    "shard",
    "split",
]

ModelT = TypeVar("ModelT", bound=nn.Module)
Plan = Mapping[str, Column | Row]


def shard(
    layer: MarlinLinear | MarlinLinear24,
    dim: int,
    rank: int,
    world_size: int,
    *,
    bounds: tuple[int, ...] | None = None,
) -> MarlinLinear | MarlinLinear24:
    """One rank's part of a packed layer, exactly, as a layer of the same kind; no communication.

    ``dim`` 0: the output features ``bounds[rank]`` to ``bounds[rank + 1]``, with their bias.
    ``dim`` 1: these input features, for ``x[..., bounds[rank]:bounds[rank + 1]]``; the outputs of
    all parts add up to the layer's, and rank 0 has the bias. A group that a bound cuts gives its
    scale to both sides, whose group size becomes 64 or 32 if need be.

    Args:
        layer: the whole layer, unchanged.
        dim: which dimension of the weight ``[out_features, in_features]`` is split.
        rank: whose part, from 0.
        world_size: how many parts there are.
        bounds: as :func:`split` returns them; None: its default.

    Raises:
        TypeError: ``layer`` is not a packed layer, or is fused with others.
        ValueError: ``dim``, ``rank`` or ``bounds`` do not fit the layer; or, for ``dim`` 1, it has
            act-order, or a bound cuts a group elsewhere than at a multiple of 32 of its columns:
            ``RowParallelMarlinLinear`` takes such layers.
    """
    share = Share.of(shape_of(layer), dim, bounds, rank, world_size)
    fix = "use RowParallelMarlinLinear.from_layer, which arranges its input"
    if not share.part.has_all_columns and layer._buffers.get("perm") is not None:
        raise ValueError(
            "layer: got act-order with dim=1; a part's columns multiply input features that lie "
            f"apart, not a slice of them; {fix}, or quantise with desc_act=False"
        )
    if share.part.lead:
        raise ValueError(
            f"bounds: got {share.part.columns.start}, which cuts a group of {layer.group_size} "
            f"columns; it can be cut at multiples of 32 of its columns; {fix}, or choose another"
        )
    bias = dim == 0 or rank == 0
    return layer_of(share.part, reader(layer, share.part), bias=bias).train(layer.training)


def parallelize(model: ModelT, plan: Plan, group: dist.ProcessGroup | None = None) -> ModelT:
    """Replace packed layers of ``model``, in place, by this rank's parts of them; returns it.

    Called on every rank of the group, with the same whole model. One layer at a time: the whole one
    is dropped before the next is cut.

    Args:
        model: contains the layers; those that the plan does not name stay whole.
        plan: a layer's full name, the last part of it, or a glob over the full name (as ``skip`` of
            :func:`marlin.replace_linear`) -> :class:`Column` or :class:`Row`. Of several that fit a
            layer the first counts.
        group: the ranks to share out to; None: all.

    Raises:
        ValueError: an entry of the plan is of no use, does not fit a layer, or names one that is
            fused with others or does more than its weight says (has hooks, for example): the
            message says which. Nothing has been replaced then.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    layers: dict[str, PackedLinear] = {}
    for path, parent in model.named_modules():
        if isinstance(parent, ParallelLinear):
            continue  # a part, which an earlier call has cut
        for attribute, child in parent._modules.items():
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(parent, FusedColumns) or isinstance(child, FusedColumns):
                continue  # of parts
            if isinstance(parent, FusedLinear) or isinstance(child, FUSED):
                _check_not_in_plan(name, plan)
            elif isinstance(child, PackedLinear):
                if id(child) not in places:
                    layers[name] = child
                places.setdefault(id(child), []).append((parent, attribute))
    shares = _follow(plan, {name: shape_of(layer) for name, layer in layers.items()}, group)
    for name in shares:
        reason = reason_to_keep(layers[name], [parent for parent, _ in places[id(layers[name])]])
        if reason:
            raise ValueError(f"{name}: cannot be replaced: {reason}; leave it out of the plan")
    for name, (style, share) in shares.items():
        layer = layers.pop(name)
        made = _make(style, share, reader(layer, share.part)).train(layer.training)
        for parent, attribute in places[id(layer)]:
            setattr(parent, attribute, made)
    return _not_saved(model)


def load(
    model: ModelT,
    directory: str | Path,
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> ModelT:
    """Load a converted checkpoint, of planned layers only what this rank needs; returns ``model``.

    As :func:`marlin.load`, which describes ``device`` and the errors, on a whole model, preferably
    on the meta device. Names in the plan, as for :func:`parallelize`, are those of the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
        ValueError: an entry of the plan is of no use, or does not fit a layer: the message names
            it. The model is unchanged then.
    """
    shares = _follow(plan, packed_modules(Checkpoint.open(directory).config), group)

    checked: dict[str, dict[str, torch.Tensor]] = {}  # what a rank has read for the checks

    def check(checkpoint: Checkpoint, name: str) -> None:
        if name not in shares:
            return check_layer(checkpoint, name)
        checked[name] = _windows(checkpoint, name, shares[name][1], CHECKED)
        check_values(name, checked[name])

    def read_layer(
        checkpoint: Checkpoint, name: str, shape: PackedShape, device: torch.device
    ) -> nn.Module:
        if name not in shares:
            return packed_layer(checkpoint, name, shape, device)
        style, share = shares[name]
        rest = [leaf for leaf in LEAVES if leaf not in CHECKED]
        windows = checked.pop(name) | _windows(checkpoint, name, share, rest)

        def read(leaf: str) -> torch.Tensor | None:
            return share.part.trim(leaf, windows[leaf]) if leaf in windows else None

        return _make(style, share, read).to(device)

    return _not_saved(fill(model, directory, device, read_layer, check))


def _not_saved(model: ModelT) -> ModelT:
    """Have ``save_pretrained``, which would write parts as if they were layers, refuse to.

    On the instance: it asks no layer before it writes.
    """
    for module in model.modules():
        has_parts = any(isinstance(child, ParallelLinear) for child in module.modules())
        if has_parts and hasattr(module, "save_pretrained"):
            module.save_pretrained = refuse_to_save  # type: ignore[assignment]
    return model


def _windows(
    checkpoint: Checkpoint, name: str, share: Share, leaves: Iterable[str]
) -> dict[str, torch.Tensor]:
    """What the rank needs of a layer's tensors."""
    return {
        leaf: checkpoint.read(f"{name}.{leaf}", share.part.window(leaf))
        for leaf in leaves
        if f"{name}.{leaf}" in checkpoint.tensors
    }


def _make(style: Column | Row, share: Share, read: Read) -> ParallelLinear:
    if isinstance(style, Column):
        return ColumnParallelMarlinLinear(share, style, read)
    return RowParallelMarlinLinear(share, style, read)


def _check_not_in_plan(name: str, plan: Plan) -> None:
    pattern = _pattern_for(name, plan)
    if pattern is not None:
        raise ValueError(
            f"{name}: got {pattern!r} in the plan for layers that are fused; layers are shared out "
            "one by one; call marlin.unfuse(model) first, or leave them out of the plan"
        )


def _pattern_for(name: str, plan: Plan) -> str | None:
    return next((pattern for pattern in plan if matches(name, pattern)), None)


def _follow(
    plan: Plan, shapes: Mapping[str, PackedShape], group: dist.ProcessGroup | None
) -> dict[str, tuple[Column | Row, Share]]:
    """What this rank gets of each layer that the plan names."""
    found: dict[str, tuple[Column | Row, Share]] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        pattern = _pattern_for(name, plan)
        if pattern is None:
            continue
        style = plan[pattern]
        if not isinstance(style, Column | Row):
            raise TypeError(
                f"plan: got {style!r} for {pattern!r}; it must be a Column or a Row; see "
                "help(marlin.parallel)"
            )
        try:
            found[name] = style, Share.here(shape, style, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        used.add(pattern)
    idle = [pattern for pattern in plan if pattern not in used]
    if idle:
        raise ValueError(
            f"plan: got {', '.join(map(repr, idle))}, which no packed layer is left for; an entry "
            "is a layer's full name, the last part of it or a glob over the full name; quantise "
            "the model first, or correct the plan"
        )
    return found
