"""The layers of :mod:`marlin.parallel`, and how their features are shared out among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, SupportsIndex, cast

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from marlin._collectives import all_features, for_all_ranks, sum_of_ranks
from marlin._fused_part import FusedPart
from marlin._packed_linear import PackedLinear
from marlin._part import Part
from marlin.formats.native import LEAVES, PackedShape
from marlin.fused_linear import FusedLinear
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24

Read = Callable[[str], Tensor | None]  # a tensor of a part by its name, None: it has none
FUSED = (FusedLinear, FusedPart)
UNITS = (128, 64, 32, 16, 8, 4, 2, 1)


def split(features: int, world_size: int, *, multiple: int | None = None) -> tuple[int, ...]:
    """Where each rank's features begin, and the end: ``world_size + 1`` numbers from 0.

    Even if the features can be shared out evenly in fours; otherwise in whole blocks of 128, or of
    the largest power of two below of which every rank gets one. It depends on nothing else, so the
    output of one layer and the input of the next are split alike.

    Args:
        features: how many there are.
        world_size: the number of ranks.
        multiple: make every rank's features a multiple of this, such as the size of a head.

    Raises:
        ValueError: there are too few features for the ranks, or they are not a multiple.
    """
    for name, number in (("features", features), ("world_size", world_size)):
        if not isinstance(number, SupportsIndex) or number < 1:
            raise ValueError(f"{name}: got {number!r}; it must be an int of at least 1")
    if multiple is not None and (
        not isinstance(multiple, SupportsIndex) or multiple < 1 or features % multiple
    ):
        raise ValueError(
            f"multiple: got {multiple} for {features} features; it must divide them; pass the size "
            "of a head, or None"
        )
    unit = multiple
    if unit is None and features % (4 * world_size) == 0:
        unit = features // world_size
    if unit is None:
        unit = next((unit for unit in UNITS if -(-features // unit) >= world_size), 1)
    units = -(-features // unit)
    if units < world_size:
        raise ValueError(
            f"world_size: got {world_size} for {features} features in units of {unit}; every rank "
            "must get at least one; use fewer ranks"
        )
    return tuple(min(units * rank // world_size * unit, features) for rank in range(world_size + 1))


@dataclass(frozen=True)
class Column:
    """Split a layer by its output features: every rank computes its own from the whole input.

    Attributes:
        gather_output: gather the outputs of all ranks, for a layer that no ``Row`` follows.
        bounds: as :func:`split` returns them; None: its default.
    """

    gather_output: bool = False
    bounds: tuple[int, ...] | None = None
    dim = 0


@dataclass(frozen=True)
class Row:
    """Split a layer by its input features: the ranks' partial results are added up.

    Attributes:
        input_is_parallel: the input is the output of a ``Column`` with the same bounds; False:
            every rank has the whole input.
        bounds: as :func:`split` returns them; None: its default.
    """

    input_is_parallel: bool = True
    bounds: tuple[int, ...] | None = None
    dim = 1


@dataclass(frozen=True)
class Share:
    """What one of several ranks has of a layer. ``group`` None: all ranks."""

    part: Part
    bounds: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls,
        whole: PackedShape,
        dim: int,
        bounds: tuple[int, ...] | None,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None = None,
    ) -> Share:
        """That of ``rank``, of a layer split along ``dim`` of its weight ``[N, K]``.

        Raises:
            ValueError: ``dim``, ``rank`` or ``bounds`` do not fit the layer.
        """
        if dim not in (0, 1):
            raise ValueError(
                f"dim: got {dim!r}; it must be 0 for output features or 1 for input features, as "
                "in the weight [out_features, in_features]"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank: got {rank}; it must be 0..{world_size - 1}; pass a group that it is in"
            )
        features = (whole.out_features, whole.in_features)[dim]
        if bounds is None:
            bounds = split(features, world_size)
        rising = all(start < stop for start, stop in pairwise(bounds))
        if len(bounds) != world_size + 1 or (bounds[0], bounds[-1]) != (0, features) or not rising:
            raise ValueError(
                f"bounds: got {tuple(bounds)}; they must be {world_size + 1} numbers that rise "
                f"from 0 to {features}; see marlin.parallel.split"
            )
        own = range(bounds[rank], bounds[rank + 1])
        ranges = [range(whole.out_features), range(whole.in_features)]
        ranges[dim] = own
        return cls(Part(whole, *ranges), tuple(bounds), rank, group)

    @classmethod
    def here(
        cls, whole: PackedShape, style: Column | Row, group: dist.ProcessGroup | None
    ) -> Share:
        """That of this process; raises what :meth:`of` does."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        return cls.of(whole, style.dim, style.bounds, rank, world_size, group)


def shape_of(layer: nn.Module) -> PackedShape:
    """The sizes of a packed layer; raises TypeError if it is another module."""
    if not isinstance(layer, PackedLinear):
        fix = "quantise it first, with MarlinLinear.from_linear or marlin.replace_linear"
        if isinstance(layer, FUSED):
            fix = "call marlin.unfuse on the model first"
        raise TypeError(
            f"layer: got {type(layer).__name__}; it must be a MarlinLinear or a MarlinLinear24; "
            f"{fix}"
        )
    return PackedShape(layer.in_features, layer.out_features, layer.group_size, layer.sparse)


def reader(layer: PackedLinear, part: Part) -> Read:
    """Reads the tensors of a part from the whole layer."""

    def read(leaf: str) -> Tensor | None:
        tensor = layer._buffers[leaf]
        return None if tensor is None else part.cut(leaf, tensor)

    return read


def layer_of(part: Part, read: Read, *, bias: bool) -> MarlinLinear | MarlinLinear24:
    """The layer of a part. Of the order of a part of the columns it knows nothing."""
    leaves = {"qweight", "scales", "zeros", "places" if part.whole.sparse else "perm"}
    if not part.has_all_columns:
        leaves -= {"perm"}
    tensors = {leaf: read(leaf) for leaf in LEAVES if leaf in leaves or (leaf == "bias" and bias)}
    sizes = {"in_features": part.shape.in_features, "out_features": part.shape.out_features}
    kind: Any = MarlinLinear24 if part.whole.sparse else MarlinLinear
    return cast("MarlinLinear | MarlinLinear24", kind.from_packed(**tensors, **sizes))


class ParallelLinear(nn.Module):
    """A rank's part of a layer, and how it works together with the others'.

    Attributes:
        layer: the rank's part, with the only tensors in the state dict; fused, a ``FusedPart``.
        in_features, out_features: those of the whole layer.
        bounds: which features are whose, as :func:`marlin.parallel.split` returns them.
        group: the ranks that share the layer; None: all.
    """

    def __init__(self, share: Share, layer: MarlinLinear | MarlinLinear24) -> None:
        super().__init__()
        whole = share.part.whole
        self.layer = layer
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.bounds, self.group = share.bounds, share.group

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bounds={self.bounds}"
        )


def refuse_to_save(*args: Any, **options: Any) -> NoReturn:
    """Stands in for ``save_pretrained`` of a model with parts of layers.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "save_pretrained: got a model with a rank's parts of layers; a checkpoint has whole "
        "layers, and nothing has been written; copy the folder that the model was loaded from, or "
        "save it before marlin.parallel shares its layers out; for ranks that share them out "
        "alike, save model.state_dict() on each"
    )


class ColumnParallelMarlinLinear(ParallelLinear):
    """A packed layer of which every rank has some of the output features.

    The input is the same on all ranks, ``[..., in_features]``; the output is
    ``[..., bounds[rank + 1] - bounds[rank]]`` or, gathered, ``[..., out_features]``. Gradients of
    the input are added up over the ranks. The tolerances are those of :mod:`marlin.parallel`.
    """

    def __init__(self, share: Share, style: Column, read: Read) -> None:
        """Called by ``from_layer`` and by the functions of :mod:`marlin.parallel`."""
        super().__init__(share, layer_of(share.part, read, bias=True))
        self.gather_output = style.gather_output

    @classmethod
    def from_layer(
        cls,
        layer: MarlinLinear | MarlinLinear24,
        group: dist.ProcessGroup | None = None,
        *,
        gather_output: bool = False,
        bounds: tuple[int, ...] | None = None,
    ) -> ColumnParallelMarlinLinear:
        """The rank's part of ``layer``, which all ranks have; arguments as in ``Column``.

        Raises:
            TypeError: ``layer`` is not a packed layer.
            ValueError: ``bounds`` do not fit it, or it has fewer features than there are ranks.
        """
        style = Column(gather_output, bounds)
        share = Share.here(shape_of(layer), style, group)
        return cls(share, style, reader(layer, share.part)).train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> the rank's output features, or all if they are gathered."""
        if not isinstance(self.layer, FusedPart):  # FusedColumns does it once for all of its parts
            input = for_all_ranks(input, self.group)
        output: Tensor = self.layer(input)
        return all_features(output, self.bounds, self.group) if self.gather_output else output


class FusedColumns(FusedLinear):
    """The layers of several ``ColumnParallelMarlinLinear`` on one input, as one GEMM.

    :func:`marlin.fuse` makes them. Gradients of the input are added up over the ranks once.
    """

    def __init__(self, parts: Sequence[ColumnParallelMarlinLinear]) -> None:
        """Copy the ranks' layers of ``parts``, of one group; raises what ``FusedLinear`` does."""
        super().__init__([part.layer for part in parts])
        self.group = parts[0].group

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """``[..., in_features]`` -> the rank's output features of each part.

        Raises:
            RuntimeError: the input has another number of features, dtype or device.
        """
        return super().forward(for_all_ranks(input, self.group))


class RowParallelMarlinLinear(ParallelLinear):
    """A packed layer of which every rank has some of the input features.

    The input is the rank's own, ``[..., bounds[rank + 1] - bounds[rank]]``, or, if
    ``input_is_parallel`` is False, the same on all ranks, ``[..., in_features]``. The output,
    ``[..., out_features]``, is the sum of all ranks', reduced in its dtype; rank 0 adds the bias.
    With act-order, a rank's columns multiply input features of all ranks: a parallel input is
    gathered for it, which costs a second collective. The tolerances are those of
    :mod:`marlin.parallel`.

    Attributes:
        order: int32, with act-order: the input features that the rank's columns multiply, or None.
    """

    order: Tensor | None

    def __init__(self, share: Share, style: Row, read: Read) -> None:
        """Called by ``from_layer`` and by the functions of :mod:`marlin.parallel`."""
        part = share.part
        super().__init__(share, layer_of(part, read, bias=share.rank == 0))
        self.input_is_parallel = style.input_is_parallel
        ordered = not part.whole.sparse and not part.has_all_columns
        self.register_buffer("order", read("perm") if ordered else None)
        self._own, self._lead = slice(part.columns.start, part.columns.stop), part.lead

    @classmethod
    def from_layer(
        cls,
        layer: MarlinLinear | MarlinLinear24,
        group: dist.ProcessGroup | None = None,
        *,
        input_is_parallel: bool = True,
        bounds: tuple[int, ...] | None = None,
    ) -> RowParallelMarlinLinear:
        """The rank's part of ``layer``, which all ranks have; arguments as in ``Row``.

        Raises:
            TypeError: ``layer`` is not a packed layer.
            ValueError: ``bounds`` do not fit it, or it has fewer features than there are ranks.
        """
        style = Row(input_is_parallel, bounds)
        share = Share.here(shape_of(layer), style, group)
        return cls(share, style, reader(layer, share.part)).train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """The rank's input features, or all -> ``[..., out_features]``, the sum of all ranks'.

        Raises:
            RuntimeError: the input has another number of features, dtype or device.
        """
        own = self._own
        wanted = own.stop - own.start if self.input_is_parallel else self.in_features
        if input.dim() and input.size(-1) != wanted:
            raise RuntimeError(
                f"input: got {input.size(-1)} features; with input_is_parallel="
                f"{self.input_is_parallel} this rank takes {wanted}; split the layer before it by "
                f"bounds={self.bounds}, too"
            )
        if self.order is not None:
            if self.input_is_parallel:
                input = all_features(input, self.bounds, self.group)
            input = for_all_ranks(input, self.group).index_select(-1, self.order)
        elif not self.input_is_parallel:
            input = for_all_ranks(input, self.group)[..., own]
        if self._lead:
            input = F.pad(input, (self._lead, 0))
        return sum_of_ranks(self.layer(input), self.group)
