"""2:4 sparse 4-bit weights in Sparse-Marlin's packing, which has two sets of names.

Those of compressed-tensors' ``marlin-24`` are used below; in brackets, those of the ``marlin_24``
checkpoints that vLLM read.

Shapes: K input features, N output features, G groups. Of the stored weights, K/2 a row,
``weight_packed`` (``B_24``) int32 ``[K/32, 2N]`` has the words of :mod:`marlin.formats.tiles` with

    n = 64 c + 8 col + 4 b + j

``meta`` (``B_meta``) int16 ``[K/32, 2N]`` has the places of four quads in a word, a nibble each, as
in our own ``places``: word (c, b2, a, b1, s, b4) of row k // 32 is of

    n = 64 c + 8 a + 4 b4 + 2 b2 + b1      columns 32 row + 16 s .. + 15

``scale_packed`` (``s``) fp16 ``[G, N]``; where G > 1, every 8 outputs in the order 0, 4, 1, 5, 2,
6, 3, 7. Symmetric; groups of 128 or one. Source: compressed_tensors, marlin_24.py and what it
calls; IST-DASLab/Sparse-Marlin, marlin/__init__.py, ``Layer_2_4``; vLLM, gptq_marlin_24.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.packed import (
    SYMMETRIC_ZERO,
    PackedWeight,
    cast_exactly,
    describe,
    label,
)
from marlin.formats.sparse import QUAD, pack_used
from marlin.formats.tiles import (
    COL,
    GROUP,
    ROWS,
    B,
    J,
    device_problems,
    nibbles,
    scale_problems,
    unpack_tiles,
)

COLUMNS = 32  # input features that the packing is in multiples of


class Names(NamedTuple):
    """What a checkpoint calls the tensors of a layer."""

    packed: str
    scale: str
    meta: str


COMPRESSED_TENSORS = Names("weight_packed", "scale_packed", "meta")
SPARSE_MARLIN = Names("B_24", "s", "B_meta")


def read_marlin_24(
    weight_packed: Tensor,
    scale_packed: Tensor,
    meta: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layer: str = "",
) -> PackedWeight:
    """Convert one layer exactly: no weight or scale changes its value.

    Args:
        weight_packed: int32 ``[K/32, 2N]``, on any device.
        scale_packed: fp16 or bf16 (or fp32, with ``dtype``) ``[G, N]``, G = 1 or K / 128.
        meta: int16 ``[K/32, 2N]``.
        dtype: of the packed scales; None keeps that of ``scale_packed``.
        layer: name of the layer, for error messages.

    Raises:
        CheckpointError: a shape, dtype or value does not fit; the message names the tensor, what
            was got, the rule and the fix.
    """
    n, k = check_layout(weight_packed, scale_packed, meta, layer)
    qweight, ours = pack_used(*unpack_weight(weight_packed, read_places(meta, layer)))
    scales = cast_exactly(order_scales(scale_packed), dtype, layer, "scale_packed")
    return PackedWeight(qweight, scales, None, None, k, n, None, ours)


def read_places(meta: Tensor, layer: str, names: Names = COMPRESSED_TENSORS) -> Tensor:
    """``meta`` -> the two places of each quad that are stored, rising: uint8 ``[N, K/4, 2]``.

    Raises:
        CheckpointError: they do not rise.
    """
    k, n = COLUMNS * meta.size(0), meta.size(1) // 2
    quads = nibbles(meta).view(k // 32, n // ROWS, 2, 8, 2, 2, 2, 4)
    quads = quads.permute(1, 3, 6, 2, 4, 0, 5, 7).reshape(n, k // QUAD)
    places = torch.stack([quads & 3, quads >> 2], -1)
    _check_places(places, layer, names)
    return places


def unpack_weight(weight_packed: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The integers, 8 where none is stored, uint8 ``[N, K]``, and which are stored, bool."""
    k, n = COLUMNS * weight_packed.size(0), weight_packed.size(1) // 2
    stored = unpack_tiles(weight_packed, (COL, B, J)).view(n, k // QUAD, 2)
    q = torch.full((n, k // QUAD, QUAD), SYMMETRIC_ZERO, dtype=torch.uint8, device=stored.device)
    used = torch.zeros_like(q, dtype=torch.bool)
    for survivor in range(2):
        where = places[..., survivor, None].long()
        q.scatter_(2, where, stored[..., survivor, None])
        used.scatter_(2, where, True)
    return q.view(n, k), used.view(n, k)


def order_scales(scale_packed: Tensor) -> Tensor:
    """The scales in the order of the output features: ``[G, N]``."""
    groups, n = scale_packed.shape
    if groups == 1:
        return scale_packed
    return scale_packed.view(groups, n // 8, 4, 2).transpose(2, 3).reshape(groups, n)


def check_layout(
    packed: Tensor,
    scale: Tensor,
    meta: Tensor,
    layer: str,
    names: Names = COMPRESSED_TENSORS,
) -> tuple[int, int]:
    """N and K, once every shape, dtype and device fits the others; values are not read."""
    prefix = label(layer)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.numel() == 0:
        raise CheckpointError(
            f"{prefix}{names.packed}: got {describe(packed)}; it must be int32 [in_features / 32, "
            "2 out_features]; is this a 2:4 layer in Marlin's packing?"
        )
    k, n = COLUMNS * packed.size(0), packed.size(1) // 2
    problems = []
    if packed.size(1) % (2 * ROWS):
        problems.append(
            f"{prefix}{names.packed}: got {describe(packed)}; out_features is a multiple of 64 in "
            "this packing, so the second size must be one of 128; 8-bit files have twice the words "
            "and are not read"
        )
    if meta.dtype != torch.int16 or meta.shape != packed.shape:
        problems.append(
            f"{prefix}{names.meta}: got {describe(meta)}; it must be int16 {list(packed.shape)}, "
            f"as {names.packed}; the tensors are not of one 4-bit layer"
        )
    unfit = scale_problems((names.scale, names.packed), scale, packed, n, k, layer)
    problems += unfit
    # Versions of compressed-tensors differ here. vLLM and Sparse-Marlin order any two groups.
    doubtful = names == COMPRESSED_TENSORS and k <= 2 * GROUP
    if not unfit and scale.size(0) > 1 and doubtful:
        problems.append(
            f"{prefix}{names.scale}: got {scale.size(0)} groups for in_features={k}; writers of "
            "this format differ in the order of the scales of such small layers; quantise this "
            "layer again in another format"
        )
    others = {names.scale: scale, names.meta: meta}
    problems += device_problems(names.packed, packed, others, layer)
    if problems:
        raise CheckpointError(problems)
    return n, k


def _check_places(places: Tensor, layer: str, names: Names) -> None:
    falling = (places[..., 0] >= places[..., 1]).view(-1)
    if bool(falling.any()):
        row, quad = divmod(int(falling.to(torch.uint8).argmax()), places.size(1))
        first, second = places[row, quad].tolist()
        raise CheckpointError(
            f"{label(layer)}{names.meta}: got the places {first}, {second} for row {row}, columns "
            f"{QUAD * quad}..{QUAD * quad + 3}; the first must be the smaller; the file is damaged"
        )
