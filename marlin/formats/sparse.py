"""2:4 sparse weights: of every four neighbouring input features, a quad, at most two are not zero.

A quantised weight is zero where its code equals its zero point. Act-order moves neighbours apart
and groups are of packed columns, so that a layer with an order cannot be packed sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.packed import SYMMETRIC_ZERO, PackedWeight, group_size_of, label

QUAD = 4
KEPT = 2
FIRST_PLACES = 0x44444444  # a word of places: 0 and 1 in each of its nibbles


def quad_problem(in_features: int) -> str:
    """Why a layer of so many input features has no quads, or nothing."""
    if in_features % QUAD == 0:
        return ""
    return (
        f"in_features: got {in_features}; a 2:4 sparse weight is of whole quads, so it must be a "
        "multiple of 4; keep this layer dense"
    )


def sparsity_problem(used: Tensor) -> str:
    """Where the weights that are not zero, bool ``[N, K]``, break the rule, or nothing."""
    n, k = used.shape
    problem = quad_problem(k)
    if problem:
        return problem
    counts = used.view(n, k // QUAD, QUAD).sum(-1, dtype=torch.uint8)
    full = counts > KEPT
    total = int(full.sum())
    if not total:
        return ""
    row, quad = divmod(int(full.view(-1).to(torch.uint8).argmax()), k // QUAD)
    return (
        f"weight: got {int(counts[row, quad])} weights other than zero in row {row}, columns "
        f"{QUAD * quad}..{QUAD * quad + 3} (the first of {total} such quads of {full.numel()}); "
        "2:4 allows 2 of every 4 neighbouring input features"
    )


def zero_codes(zeros: Tensor | None, k: int) -> Tensor:
    """The zero point of each weight, to be broadcast to uint8 ``[N, K]``.

    ``zeros`` uint8 ``[G, N]``, None: 8 everywhere.
    """
    if zeros is None:
        return torch.tensor(SYMMETRIC_ZERO, dtype=torch.uint8)
    if zeros.size(0) == 1:
        return zeros.T
    return zeros.T.repeat_interleave(group_size_of(k, zeros.size(0)), 1)[:, :k]


def used_codes(q: Tensor, zeros: Tensor | None) -> Tensor:
    """Which codes, uint8 ``[N, K]``, differ from their zero points: bool ``[N, K]``."""
    return q != zero_codes(zeros, q.size(1))


def order_problem(perm: Tensor | None) -> str:
    """Why a layer of this order of features cannot be sparse, or nothing."""
    if perm is None:
        return ""
    return (
        "g_idx: got act-order; it moves neighbouring input features apart, and 2:4 sparsity is of "
        "neighbours; quantise again with desc_act=False (actorder=None), or keep the layer dense"
    )


def pack_used(q: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """``qweight`` and ``places`` of codes, uint8 ``[N, K]``, of which ``used`` are not zero."""
    qweight, places = torch.ops.marlin.pack_24(q.contiguous(), used.contiguous())
    return qweight, places


def sparsify(packed: PackedWeight, layer: str = "") -> PackedWeight:
    """The same layer with its zeros left out.

    Raises:
        CheckpointError: it has act-order, or a quad with more than two weights that are not zero;
            the message names the first of them.
    """
    problem = order_problem(packed.perm) or quad_problem(packed.in_features)
    if problem:
        raise CheckpointError(f"{label(layer)}{problem}")
    q = torch.ops.marlin.unpack(packed.qweight, packed.out_features, packed.in_features)
    used = used_codes(q, packed.zeros)
    problem = sparsity_problem(used)
    if problem:
        raise CheckpointError(
            f"{label(layer)}{problem}; prune the model to 2:4 before it is quantised, or keep this "
            "layer dense, as MarlinLinear"
        )
    qweight, places = pack_used(q, used)
    return packed._replace(qweight=qweight, places=places)


def places_problem(places: Tensor) -> str:
    """Which word of ``places`` ``[.., .., 256]`` no packing gives, or nothing.

    The two places of a quad, the first in the low bits of a nibble, must rise.
    """
    first_low, first_high, second_low, second_high = (places >> bit for bit in range(QUAD))
    lower = ~(first_high ^ second_high) & ~first_low & second_low
    rise = ((~first_high & second_high) | lower) & 0x11111111 == 0x11111111
    if bool(rise.all()):
        return ""
    row_block, column_block, word = (int(i) for i in (~rise).nonzero()[0])
    return (
        f"places: got {int(places[row_block, column_block, word]) & 0xFFFFFFFF:#010x} at "
        f"[{row_block}, {column_block}, {word}]; the two places of every quad must rise, as "
        "torch.ops.marlin.pack_24 writes them"
    )
