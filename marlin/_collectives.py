"""The collectives of tensor parallelism, with their gradients.

Between a column-parallel and a row-parallel layer a rank's activations are its own; outside, they
are the same on all ranks, and so are their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _ForAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = y.clone()  # in place, torch.compile would not take it
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bounds: Sequence[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        widths = [stop - start for start, stop in pairwise(bounds)]
        rank = dist.get_rank(group)
        ctx.own = bounds[rank], bounds[rank + 1]
        # Gloo gathers tensors of one shape only.
        widest = F.pad(x, (0, max(widths) - x.size(-1))).contiguous()
        parts = [torch.empty_like(widest) for _ in widths]
        dist.all_gather(parts, widest, group=group)
        return torch.cat([p[..., :width] for p, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.own
        return grad[..., start:stop], None, None


def _applied(function: Any, *arguments: Any) -> Tensor:
    """``function.apply``, which is typed in some versions of torch only."""
    return cast(Tensor, function.apply(*arguments))


def for_all_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x``, equal on all ranks, to be used by each in its own way: gradients are added up."""
    return _applied(_ForAllRanks, x, group) if x.requires_grad else x


def sum_of_ranks(y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all ranks' ``y``, in its dtype; in its memory, too, where it has no gradient."""
    if y.requires_grad:
        return _applied(_SumOfRanks, y, group)
    dist.all_reduce(y, group=group)
    return y


def all_features(x: Tensor, bounds: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """``[..., bounds[-1]]`` on every rank, from features ``bounds[r]`` to ``bounds[r + 1]``."""
    return _applied(_AllFeatures, x, bounds, group)
