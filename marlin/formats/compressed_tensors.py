"""compressed-tensors layers (``pack-quantized``, 4-bit integers) as tensors.

Shapes: K input features, N output features, G groups. ``weight_packed`` int32 ``[N, ceil(K/8)]``:
nibble i of word (n, r) is the weight of feature 8r + i, stored as q + 8 (offset binary: the codes
0..15 that the kernels read). ``weight_scale`` ``[N, G]``. ``weight_zero_point`` int32
``[ceil(N/8), G]``, packed along the output features in the same offset binary, only where the
weight is asymmetric; files of before zero points were packed hold int8 ``[N, G]`` of -8..7.
``weight_g_idx`` ``[K]``: the group of each feature, if ``actorder`` is ``group``. ``weight_shape``
(N, K).
Source: compressed_tensors/compressors/pack_quantized. Settings are read by
:mod:`marlin.formats.compressed_tensors_config`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.compressed_tensors_config import (
    CompressedTensorsConfig,
    WeightGroup,
    parse_compressed_tensors_config,
)
from marlin.formats.gptq import group_order
from marlin.formats.packed import (
    SYMMETRIC_ZERO,
    PackedWeight,
    cast_exactly,
    describe,
    group_size_of,
    label,
)

__all__ = [
    "CompressedTensorsConfig",
    "WeightGroup",
    "pack_compressed_tensors",
    "parse_compressed_tensors_config",
    "unpack_nibbles",
]


def unpack_nibbles(words: Tensor, count: int) -> Tensor:
    """int32 ``[rows, W]`` -> the first ``count`` nibbles of each row: uint8 ``[rows, count]``."""
    nibbles = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for nibble in range(8):
        nibbles[..., nibble] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return nibbles.view(words.size(0), -1)[:, :count]


def pack_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor | Sequence[int],
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    layer: str = "",
) -> PackedWeight:
    """Convert one ``pack-quantized`` layer exactly: no weight, scale or zero point changes.

    Args:
        weight_packed: int32 ``[N, ceil(K/8)]``, on any device.
        weight_scale: fp16 or bf16 (or fp32, with ``dtype``) ``[N, G]``; G = 1 is one scale per
            output feature (``strategy: channel``).
        weight_shape: (N, K): two integers, or an integer tensor of two.
        weight_zero_point: int32 ``[ceil(N/8), G]``, int8 ``[N, G]``, or None: symmetric.
        weight_g_idx: integers ``[K]``, the group of each input feature; None, or all -1: in order.
        dtype: of the packed scales; None keeps that of ``weight_scale``.
        layer: name of the layer, for error messages.

    Raises:
        CheckpointError: a shape, dtype or value does not fit; the message names the tensor, what
            was got, the rule and the fix.
    """
    n, k = read_shape(weight_shape, layer)
    check_layout(weight_packed, weight_scale, n, k, layer)
    optional = {"weight_zero_point": weight_zero_point, "weight_g_idx": weight_g_idx}
    _check_devices(weight_packed, {"weight_scale": weight_scale, **optional}, layer)
    group_size = group_size_of(k, weight_scale.size(1), layer)
    scales = cast_exactly(weight_scale.T, dtype, layer, "weight_scale")
    zeros = None
    if weight_zero_point is not None:
        zeros = read_zeros(weight_zero_point, n, weight_scale.size(1), layer)
    perm = None
    if weight_g_idx is not None:
        perm = read_order(weight_g_idx, k, group_size, layer)
    return PackedWeight(pack_codes(weight_packed, k, perm), scales, zeros, perm, k, n)


def pack_codes(weight_packed: Tensor, k: int, perm: Tensor | None) -> Tensor:
    """``PackedWeight.qweight`` of ``weight_packed``, the features in the order ``perm``."""
    packed: Tensor
    if k % 8 == 0:  # the transposed grid of words is that of a GPTQ layer: no need to unpack
        packed = torch.ops.marlin.repack_gptq(weight_packed.T.contiguous(), perm)
    else:
        q = unpack_nibbles(weight_packed, k)
        packed = torch.ops.marlin.pack((q if perm is None else q[:, perm.long()]).contiguous())
    return packed


def read_shape(weight_shape: Tensor | Sequence[int], layer: str) -> tuple[int, int]:
    """N and K."""
    if isinstance(weight_shape, Tensor):
        integer = not (weight_shape.is_floating_point() or weight_shape.is_complex())
        values = weight_shape.tolist() if integer and weight_shape.dim() == 1 else []
    else:
        values = list(weight_shape)
    if len(values) != 2 or not all(type(value) is int and value > 0 for value in values):
        got = describe(weight_shape) if isinstance(weight_shape, Tensor) else repr(weight_shape)
        raise CheckpointError(
            f"{label(layer)}weight_shape: got {got} = {values}; it must be two positive integers, "
            "(out_features, in_features); the file is damaged, or this is not a linear layer"
        )
    return values[0], values[1]


def check_layout(packed: Tensor, scale: Tensor, n: int, k: int, layer: str) -> None:
    """Refuse shapes and dtypes that do not fit; values are not read."""
    words = -(-k // 8)
    problems = []
    if packed.dtype != torch.int32 or packed.shape != (n, words):
        problems.append(
            f"{label(layer)}weight_packed: got {describe(packed)}; weight_shape ({n}, {k}) in 4 "
            f"bits must be int32 [{n}, {words}]; 8-bit files have twice the words, and 2:4 sparse "
            "ones (marlin-24) are for MarlinLinear24.from_marlin_24: see num_bits and format in "
            "config.json"
        )
    if scale.dim() != 2 or scale.size(0) != n or scale.size(1) == 0:
        problems.append(
            f"{label(layer)}weight_scale: got {describe(scale)}; it must be [{n}, groups], or "
            f"[{n}, 1] for one scale per output feature; strategies tensor and block are not read"
        )
    if problems:
        raise CheckpointError(problems)


def _check_devices(packed: Tensor, others: dict[str, Tensor | None], layer: str) -> None:
    problems = [
        f"{label(layer)}{name}: got a tensor on {tensor.device}; weight_packed is on "
        f"{packed.device} and all must be on one device; move it with "
        f"{name}.to({str(packed.device)!r})"
        for name, tensor in others.items()
        if tensor is not None and tensor.device != packed.device
    ]
    if problems:
        raise CheckpointError(problems)


def read_zeros(zero_point: Tensor, n: int, groups: int, layer: str) -> Tensor | None:
    """True zero points 0..15, uint8 ``[G, N]``; None where all are 8."""
    if zero_point.dtype == torch.int32 and zero_point.shape == (-(-n // 8), groups):
        zeros = unpack_nibbles(zero_point.T, n)
    elif zero_point.dtype == torch.int8 and zero_point.shape == (n, groups):
        low, high = int(zero_point.min()), int(zero_point.max())
        if low < -8 or high > 7:
            raise CheckpointError(
                f"{label(layer)}weight_zero_point: got int8 values {low}..{high}; 4-bit zero "
                "points are -8..7; the file is damaged, or its weights are not 4-bit"
            )
        zeros = (zero_point.T + SYMMETRIC_ZERO).to(torch.uint8)
    else:
        raise CheckpointError(
            f"{label(layer)}weight_zero_point: got {describe(zero_point)}; it must be int32 "
            f"[{-(-n // 8)}, {groups}], packed along the output features; pass None for "
            "symmetric weights"
        )
    return None if bool((zeros == SYMMETRIC_ZERO).all()) else zeros.contiguous()


def read_order(g_idx: Tensor, k: int, group_size: int, layer: str) -> Tensor | None:
    """The order of the features that sorts them by group, int32 ``[K]``; None: they are sorted."""
    if g_idx.shape != (k,) or g_idx.is_floating_point() or g_idx.is_complex():
        raise CheckpointError(
            f"{label(layer)}weight_g_idx: got {describe(g_idx)}; it must be integers [{k}], the "
            "group of each input feature; pass None for a layer without act-order"
        )
    if bool((g_idx == -1).all()):  # how compressed-tensors initialises it: not set
        return None
    perm = group_order(layer or "layer", g_idx.cpu(), group_size)
    return None if perm is None else perm.to(g_idx.device)
