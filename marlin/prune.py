"""Which weights of a float layer survive in a 2:4 sparse one.

Only by magnitude so far: no data, one pass, and a loss of quality that fine-tuning or pruning by
calibration data (as SparseGPT does) would avoid. It is for trying the layers out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marlin.formats.packed import label
from marlin.formats.sparse import KEPT, QUAD, quad_problem, sparsity_problem


def largest_two(weight: Tensor) -> Tensor:
    """The two of every four neighbours that are largest in magnitude: bool ``[N, K]``.

    Of equal ones the first. NaN counts as larger than any number, so that it is not lost.
    """
    n, k = weight.shape
    quads = weight.detach().abs().view(n, k // QUAD, QUAD)
    kept = torch.empty(quads.shape, dtype=torch.bool, device=weight.device)
    for place in range(QUAD):
        own = quads[..., place]
        ahead = torch.zeros(own.shape, dtype=torch.uint8, device=weight.device)
        for other in range(QUAD):
            if other != place:
                theirs = quads[..., other]
                ahead += (theirs >= own) if other < place else (theirs > own)
        kept[..., place] = ahead < KEPT
    return kept.view(n, k)


METHODS: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": largest_two}


def check_method(prune: str | None) -> None:
    """Refuse a way of pruning that is not known; None is: the weights are pruned already."""
    if prune is not None and prune not in METHODS:
        raise ValueError(
            f"prune: got {prune!r}; it must be {' or '.join(map(repr, METHODS))}, the weights that "
            "are kept, or None for weights that are 2:4 already"
        )


def weights_to_keep(weight: Tensor, prune: str | None, layer: str = "") -> Tensor:
    """Which weights of ``[N, K]`` a 2:4 sparse layer keeps: bool ``[N, K]``.

    Raises:
        ValueError: K is not a multiple of 4, ``prune`` is not known, or it is None and the weight
            is not 2:4: the message names the row and columns of the first offending quad.
    """
    check_method(prune)
    problem = quad_problem(weight.size(1))
    if not problem and prune is not None:
        return METHODS[prune](weight.contiguous())
    used = weight.detach().contiguous() != 0
    problem = problem or sparsity_problem(used)
    if problem:
        fix = "" if weight.size(1) % QUAD else "; prune it first, for a try with prune='magnitude'"
        raise ValueError(f"{label(layer)}{problem}{fix}")
    return used
