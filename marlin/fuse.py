"""Run packed layers that read one input, such as q, k and v, as one GEMM, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import FunctionType
from typing import cast

import torch.distributed as dist
from torch import nn

from marlin._call_runs import CallRun, call_runs
from marlin._fuse_report import FusedLayers, FuseReport
from marlin._fused_part import FusedPart
from marlin._packed_linear import PackedLinear
from marlin._parallel_linear import (
    ColumnParallelMarlinLinear,
    FusedColumns,
    RowParallelMarlinLinear,
)
from marlin._replace_report import SkippedLayer
from marlin.fused_linear import (
    BLOCK,
    FusedLinear,
    difference,
    reason_not_to_fuse,
)
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.replace import reason_of_instance

__all__ = ["FuseReport", "FusedLayers", "SkippedLayer", "fuse", "unfuse"]

LINEAR = (nn.Linear, PackedLinear, ColumnParallelMarlinLinear)
HARMLESS = (
    *(nn.Linear, MarlinLinear, MarlinLinear24, FusedPart),
    *(ColumnParallelMarlinLinear, RowParallelMarlinLinear),
)


def fuse(model: nn.Module, *, groups: Iterable[Sequence[str]] | None = None) -> FuseReport:
    """Fuse the packed layers inside ``model`` that read the same input; its code stays as it is.

    With few tokens much of a layer's time is its launch, and small layers do not fill the GPU.
    Which layers share an input is not guessed from names but read from the source of each module's
    ``forward``, as in ``self.q_proj(x)``, ``self.k_proj(x)``: any names do, and it is known that
    nothing writes ``x`` between the calls. A module keeps its layers if it calls one in several
    places, or does between two calls what could write their input; a :class:`marlin.FusedLinear`
    can be called by code of your own.

    The layers become parts of a ``FusedLinear`` that is added beside them. They keep their names
    in state dicts and checkpoints, and compute the same, whatever calls them, in whatever order
    (:mod:`marlin.fused_linear` says why). Their outputs are slices of one tensor, not contiguous
    where there are several rows.

    Fused are ``MarlinLinear`` or ``MarlinLinear24`` layers of one kind, with the same input
    features, group size, symmetry, dtype, device and act-order; all but one with a multiple of 64
    output features. So are the rank's parts of layers that :class:`marlin.parallel.Column` shares
    out, where that holds on every rank: every rank must call this. Left as they are, with the
    reason in the report: others; layers that have hooks or a forward of their own, or are in
    several places of the model. Layers with adapters of peft are not looked at. One group at a time
    is copied, then its old tensors are dropped. A ``forward`` that is replaced later is not read
    again. Give ``torch.compile`` the whole model: given just the module whose layers are fused,
    with ``fullgraph=True``, torch 2.15 has each of them run the whole GEMM.

    Args:
        model: any module with packed layers; changed in place. Fusing again changes nothing.
        groups: names of children to fuse, ``[("wq", "wk", "wv")]``, in all modules that have them;
            None: all that share an input.

    Raises:
        TypeError: ``model`` is not a module, or ``groups`` are not lists of names.
        ValueError: a group is of fewer than two names, or no module has children of its names.
    """
    _check_model(model)
    wanted = None if groups is None else _check_groups(model, groups)
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    report = FuseReport()
    # Not of the layers themselves: their old tensors are to go one group after the other.
    parents = [(path, m) for path, m in model.named_modules() if not isinstance(m, LINEAR)]
    for path, parent in parents:
        siblings = _Siblings(parent, path, uses, report)
        if wanted is None:
            siblings.fuse()
        for group in wanted or ():
            siblings.fuse(group)
    return report


def unfuse(model: nn.Module) -> int:
    """Give every fused layer inside ``model`` tensors of its own again; returns how many.

    The inverse of :func:`fuse`, with the present values; one group at a time is copied.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a fused layer was replaced or given hooks since; nothing has been changed.
    """
    _check_model(model)
    attached = [
        (path, parent, name)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, FusedLinear) and child.names
    ]
    for path, parent, name in attached:
        problem = cast(FusedLinear, parent._modules[name]).detach_problem(parent)
        if problem:
            raise ValueError(
                f"model: in {path or 'the model itself'} {problem}; undo that first; nothing has "
                "been changed"
            )
    count = 0
    for _, parent, name in attached:
        fused = cast(FusedLinear, parent._modules[name])
        fused.detach(parent)
        count += len(fused.names)
        del fused  # before the next is copied
    return count


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; it must be a torch.nn.Module")


def _check_groups(model: nn.Module, groups: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    checked = []
    for group in groups if isinstance(groups, Iterable) else [groups]:
        names = isinstance(group, Iterable) and all(isinstance(name, str) for name in group)
        if isinstance(group, str) or not names:
            raise TypeError(
                f"groups: got {group!r}; each group must be a sequence of names; pass "
                "[('q_proj', 'k_proj', 'v_proj')]"
            )
        if len(set(group)) < 2 or any("." in name for name in group):
            raise ValueError(
                f"groups: got {tuple(group)}; a group must be at least two names of children of "
                "one module, without dots; pass [('q_proj', 'k_proj', 'v_proj')]"
            )
        if not any(module._modules.keys() >= set(group) for module in model.modules()):
            raise ValueError(
                f"groups: got {tuple(group)}; no module of the model has children of these names; "
                "see print(model)"
            )
        checked.append(tuple(dict.fromkeys(group)))
    return checked


def _writes_nothing(child: nn.Module | None) -> bool:
    """Whether a call of a child, and of what it has inside, is known to leave its input alone."""
    return child is not None and all(
        type(module) in HARMLESS and not reason_of_instance(module) for module in child.modules()
    )


def _packed(child: nn.Module | None) -> PackedLinear | None:
    """The packed layer that a child is, or a rank's part of one in it; None: neither."""
    if isinstance(child, ColumnParallelMarlinLinear):
        child = child.layer
    return child if isinstance(child, PackedLinear) else None


def _sizes(child: nn.Module) -> list[int]:
    """The output features of a layer, or those of it that each rank has."""
    if isinstance(child, ColumnParallelMarlinLinear):
        return [stop - start for start, stop in pairwise(child.bounds)]
    return [cast(PackedLinear, child).out_features]


def _ranks(child: nn.Module) -> tuple[dist.ProcessGroup | None, ...]:
    """The group that a layer is shared out to, if it is."""
    return (child.group,) if isinstance(child, ColumnParallelMarlinLinear) else ()


def _difference(child: nn.Module, other: nn.Module, name: str) -> str:
    """Why one GEMM cannot be that of a layer and of ``other``, called ``name``, too; or empty."""
    if _ranks(child) != _ranks(other):
        return f"it is not shared out among the same ranks as {name}"
    return difference(cast(PackedLinear, _packed(child)), cast(PackedLinear, _packed(other)), name)


def _other_methods(kind: type[nn.Module]) -> list[FunctionType]:
    """The functions of a class and of its bases, but those of ``nn.Module`` and ``forward``."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return [
        function
        for base in bases
        for name, function in vars(base).items()
        if isinstance(function, FunctionType) and name not in ("forward", "__init__")
    ]


class _Siblings:
    """The linear layers of one module."""

    def __init__(
        self, parent: nn.Module, path: str, uses: Counter[int], report: FuseReport
    ) -> None:
        self._parent, self._path, self._uses, self._report = parent, path, uses, report

    def fuse(self, group: Sequence[str] | None = None) -> None:
        """Fuse what can be fused, of ``group`` only; enter it, and what cannot, in the report."""
        children = self._parent._modules
        if group is not None and not children.keys() >= set(group):
            return
        linear = [name for name, child in children.items() if isinstance(child, LINEAR)]
        wanted = [name for name in linear if group is None or name in group]
        packed = [name for name in wanted if _packed(children[name])]
        if not packed or len(linear) < 2:
            return
        harmless = [name for name, child in children.items() if _writes_nothing(child)]
        forward = vars(self._parent).get("forward", type(self._parent).forward)
        try:
            runs = call_runs(forward, wanted, harmless, _other_methods(type(self._parent)))
        except OSError as error:
            if group is not None or len(packed) > 1:
                self._skip(packed, f"{error}; use marlin.FusedLinear in a forward of your own")
            return
        for run in runs:
            self._fuse_run(run)
        if group is not None:
            met = {name for run in runs for name in run.names}
            kind = type(self._parent).__name__
            alone = [name for name in packed if name not in met]
            self._skip(alone, f"{kind}.forward calls no other of the group on the same variable")

    def _fuse_run(self, run: CallRun) -> None:
        children = self._parent._modules
        names = [name for name in run.names if _packed(children[name])]
        if run.problem:
            for name in names:
                self._skip([name], self._reason_alone(name) or run.problem)
            return
        buckets: list[list[str]] = []
        for name in names:
            reason = self._reason_alone(name)
            if reason:
                self._skip([name], reason)
            else:
                self._join(name, buckets)
        for name in [bucket[0] for bucket in buckets if len(bucket) == 1]:
            others = [other for other in run.names if other != name]
            self._skip([name], self._reason_against(name, others))
        for bucket in buckets:
            if len(bucket) > 1:
                self._replace(bucket)

    def _join(self, name: str, buckets: list[list[str]]) -> None:
        """Put a layer into the first of the buckets that it fits, or into one of its own."""
        child = self._child(name)
        for bucket in buckets:
            fits = not _difference(child, self._child(bucket[0]), bucket[0])
            if fits and not (self._is_partial(name) and any(map(self._is_partial, bucket))):
                bucket.append(name)
                return
        buckets.append([name])

    def _reason_alone(self, name: str) -> str:
        child = self._child(name)
        layer = cast(PackedLinear, _packed(child))
        if max(self._uses[id(child)], self._uses[id(layer)]) > 1:
            return "it is in several places of the model"
        return reason_of_instance(child) or reason_not_to_fuse(layer)

    def _reason_against(self, name: str, others: Sequence[str]) -> str:
        """Why a layer that could be fused found none to be fused with."""
        reasons = []
        for other in others:
            child = self._child(other)
            if not _packed(child):
                reasons.append(f"{other} is a {type(child).__name__}, not packed")
            elif self._reason_alone(other):
                reasons.append(f"{other} cannot be fused")
            elif reason := _difference(self._child(name), child, other):
                reasons.append(reason)
            elif self._is_partial(other):
                sizes = ", ".join(map(str, _sizes(self._child(name))))
                reasons.append(
                    f"its {sizes} output features are not a multiple of {BLOCK}, nor are those of "
                    f"{other}, and only the last may be so"
                )
        return "; ".join(reasons)

    def _replace(self, names: list[str]) -> None:
        children = [self._child(name) for name in names]
        if all(isinstance(child, ColumnParallelMarlinLinear) for child in children):
            fused: FusedLinear = FusedColumns(cast(list[ColumnParallelMarlinLinear], children))
            fused.attach(self._parent, [f"{name}.layer" for name in names])
        else:
            fused = FusedLinear(cast(list[PackedLinear], children))
            fused.attach(self._parent, names)
        shape = (sum(fused.sizes), fused.packed.in_features)
        self._report.fused.append(FusedLayers(tuple(map(self._full, names)), shape))

    def _child(self, name: str) -> nn.Module:
        return cast(nn.Module, self._parent._modules[name])

    def _is_partial(self, name: str) -> bool:
        """Whether it ends inside a block, here or, so that all ranks decide alike, on any rank."""
        return any(size % BLOCK for size in _sizes(self._child(name)))

    def _full(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _skip(self, names: Iterable[str], reason: str) -> None:
        self._report.skipped += [SkippedLayer(self._full(name), reason) for name in names]
