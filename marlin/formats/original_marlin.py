"""Layers of the original Marlin kernel (IST-DASLab/marlin): dense 4-bit weights in its packing.

Shapes: K input features, N output features, G groups. ``B`` int32 ``[K/16, 2N]``, the words of
:mod:`marlin.formats.tiles` with

    n = 64 c + 16 j + 8 b + col

``s`` fp16 ``[G, N]``, the scales: where G > 1, of every 64 outputs 8 i + j at place 8 j + i; where
G = 1, of every 32 outputs 8 q + 2 i + r at place 8 i + 2 q + r (i, q: 0..3, r: 0..1). A weight is
``(q - 8) * scale``: symmetric; groups of 128 or one; no act-order. Source: ``Layer`` and
``_get_perms`` of IST-DASLab/marlin, marlin/__init__.py; AutoGPTQ and vLLM use the same tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.packed import PackedWeight, cast_exactly, describe, label
from marlin.formats.tiles import (
    COL,
    DEPTH,
    ROWS,
    B,
    J,
    device_problems,
    scale_problems,
    unpack_tiles,
)


def read_original_marlin(
    words: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layer: str = "",
) -> PackedWeight:
    """Convert one layer exactly: no weight or scale changes its value.

    Args:
        words: ``B``, int32 ``[K/16, 2N]``, on any device.
        scales: ``s``, fp16 or bf16 (or fp32, with ``dtype``) ``[G, N]``, G = 1 or K / 128.
        dtype: of the packed scales; None keeps that of ``scales``.
        layer: name of the layer, for error messages.

    Raises:
        CheckpointError: a shape, dtype or value does not fit; the message names the tensor, what
            was got, the rule and the fix.
    """
    n, k = check_layout(words, scales, layer)
    qweight = torch.ops.marlin.pack(unpack_weight(words))
    ordered = cast_exactly(order_scales(scales), dtype, layer, "s")
    return PackedWeight(qweight, ordered, None, None, k, n)


def unpack_weight(words: Tensor) -> Tensor:
    """``B`` -> the integers, uint8 ``[N, K]``."""
    return unpack_tiles(words, (J, B, COL))


def order_scales(scales: Tensor) -> Tensor:
    """``s`` -> the scales in the order of the output features, ``[G, N]``."""
    groups, n = scales.shape
    if groups == 1:
        return scales.view(1, n // 32, 4, 4, 2).transpose(2, 3).reshape(1, n)
    return scales.view(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n)


def check_layout(words: Tensor, scales: Tensor, layer: str) -> tuple[int, int]:
    """N and K, once every shape, dtype and device fits the others; values are not read."""
    prefix = label(layer)
    if words.dtype != torch.int32 or words.dim() != 2 or words.numel() == 0:
        raise CheckpointError(
            f"{prefix}B: got {describe(words)}; it must be int32 [in_features / 16, 2 "
            "out_features]; is this a layer of the original Marlin kernel?"
        )
    k, n = DEPTH * words.size(0), words.size(1) // 2
    problems = []
    if words.size(1) % (2 * ROWS):
        problems.append(
            f"{prefix}B: got {describe(words)}; out_features is a multiple of 64 in this packing, "
            "so the second size must be one of 128; the file is damaged, or its weights are not "
            "4-bit"
        )
    problems += scale_problems(("s", "B"), scales, words, n, k, layer)
    problems += device_problems("B", words, {"s": scales}, layer)
    if problems:
        raise CheckpointError(problems)
    return n, k
