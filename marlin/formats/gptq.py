"""GPTQ layers as tensors: checks, zero points, act-order, and the packing that the kernels read.

Shapes: K input features, N output features, G groups. ``qweight`` int32 [K/8, N], nibble i of word
(r, n) is the weight of feature 8r + i; ``qzeros`` int32 [G, N/8], nibble j of word (g, c) is the
zero point of output 8c + j; ``scales`` [G, N]; ``g_idx`` int32 [K], the group of each feature. A
weight is ``(q - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.gptq_config import GptqConfig, GptqSettings, parse_gptq_config
from marlin.formats.packed import (
    COMPUTE_DTYPES,
    SYMMETRIC_ZERO,
    PackedWeight,
    Parameters,
    cast_bias,
    cast_exactly,
    group_count,
)

__all__ = [
    "GptqConfig",
    "GptqSettings",
    "Parameters",
    "TensorSpec",
    "group_order",
    "layout_problems",
    "pack_linear",
    "parse_gptq_config",
    "read_parameters",
    "unpack_weight",
    "unpack_zeros",
    "zeros_are_ambiguous",
]

REQUIRED = ("qweight", "qzeros", "scales", "g_idx")
LEAVES = (*REQUIRED, "bias")


class TensorSpec(NamedTuple):
    """Dtype (None: one that torch does not have) and shape of a tensor, in memory or not."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def layout_problems(
    name: str, specs: Mapping[str, TensorSpec], settings: GptqSettings
) -> list[str]:
    """What is wrong with the dtypes and shapes of a layer's tensors, by tensor name."""
    problems = [f"{name}: {leaf} is missing" for leaf in REQUIRED if leaf not in specs]
    if problems:
        return problems
    rules: list[tuple[str, int, tuple[torch.dtype, ...]]] = [
        ("qweight", 2, (torch.int32,)),
        ("qzeros", 2, (torch.int32,)),
        ("scales", 2, (*COMPUTE_DTYPES, torch.float32)),
        ("g_idx", 1, (torch.int32, torch.int64)),
        ("bias", 1, (*COMPUTE_DTYPES, torch.float32)),
    ]
    for leaf, dimensions, dtypes in rules:
        spec = specs.get(leaf)
        if spec is None:
            continue
        if spec.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            problems.append(f"{name}: {leaf} is {spec.dtype}, want {allowed}")
        if len(spec.shape) != dimensions:
            problems.append(
                f"{name}: {leaf} has shape {list(spec.shape)}, want {dimensions} dimensions"
            )
    if problems:
        return problems
    words, n = specs["qweight"].shape
    k = 8 * words
    if k == 0 or n == 0:
        return [f"{name}: qweight has shape {[words, n]}, which holds no weights"]
    if n % 8:
        return [
            f"{name}: {n} output features; GPTQ packs zero points by 8, so it must be a multiple "
            "of 8"
        ]
    groups = group_count(k, settings.group_size)
    wanted = {
        "qzeros": (groups, n // 8),
        "scales": (groups, n),
        "g_idx": (k,),
        "bias": (n,),
    }
    for leaf, shape in wanted.items():
        if leaf in specs and specs[leaf].shape != shape:
            problems.append(
                f"{name}: {leaf} has shape {list(specs[leaf].shape)}, want {list(shape)} for 4-bit "
                f"qweight {[words, n]} (K={k}, N={n}) with group_size {settings.group_size}"
            )
    return problems


def unpack_weight(qweight: Tensor) -> Tensor:
    """GPTQ ``qweight`` int32 [K/8, N] -> the integers, uint8 [N, K]."""
    words, n = qweight.shape
    out = torch.empty(n, words, 8, dtype=torch.uint8)
    for nibble in range(8):
        out[:, :, nibble] = ((qweight >> (4 * nibble)) & 15).T
    return out.view(n, 8 * words)


def unpack_zeros(qzeros: Tensor, settings: GptqSettings) -> Tensor:
    """GPTQ ``qzeros`` int32 [G, N/8] -> the true zero points 0..15, uint8 [G, N]."""
    groups, words = qzeros.shape
    stored = qzeros.to(torch.int64) & 0xFFFFFFFF
    if settings.zeros_version == 1 and settings.zeros_carry:
        stored = stored + 0x11111111
    nibbles = (stored.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    if settings.zeros_version == 1 and not settings.zeros_carry:
        nibbles = (nibbles + 1) & 15
    return nibbles.to(torch.uint8).reshape(groups, 8 * words)


def zeros_are_ambiguous(qzeros: Tensor, settings: GptqSettings) -> bool:
    """Whether tools read these zero points differently: a stored 15 carries, or does not."""
    if settings.zeros_version != 1 or settings.zeros_carry:
        return False
    carried = GptqSettings(settings.group_size, settings.sym, 1, True)
    return not torch.equal(unpack_zeros(qzeros, settings), unpack_zeros(qzeros, carried))


def group_order(name: str, g_idx: Tensor, group_size: int) -> Tensor | None:
    """The order that sorts features by group: int32 [K], or None when they are sorted already.

    Packed column j is feature ``order[j]``; the sort is stable. Raises :class:`CheckpointError`
    when a group is out of range or the sorted groups are not full, in order, one after the other.
    """
    k = g_idx.numel()
    groups = group_count(k, group_size)
    index = g_idx.to(torch.int64)
    outside = (index < 0) | (index >= groups)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{name}: g_idx[{row}] is {int(index[row])}, want a group in 0..{groups - 1}"
        )
    if groups == 1:
        return None  # every order of one group is the same sum
    expected = torch.arange(k) // group_size
    if torch.equal(index, expected):
        return None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], expected):
        counts, full = torch.bincount(index, minlength=groups), torch.bincount(expected)
        group = int((counts != full).nonzero()[0])
        raise CheckpointError(
            f"{name}: g_idx puts {int(counts[group])} features into group {group}, want "
            f"{int(full[group])}: the groups are not balanced, as in a row-parallel slice of an "
            "act-order layer; convert the whole checkpoint"
        )
    return order.to(torch.int32)


def read_parameters(
    name: str,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    settings: GptqSettings,
    dtype: torch.dtype | None = None,
) -> Parameters:
    """Check and decode all of a layer but its weight.

    The dtypes and shapes must have passed :func:`layout_problems`.
    ``dtype`` asks for float16 or bfloat16 scales, refused unless it holds them exactly, and for a
    bias rounded to it; None keeps that of the scales, which must hold the bias exactly. Raises
    :class:`CheckpointError` listing all that is wrong, by layer, group and column.
    """
    problems: list[str] = []
    perm = zeros = kept_bias = None
    kept = scales
    try:
        perm = group_order(name, g_idx, settings.group_size)
    except CheckpointError as error:
        problems += error.refusals
    found = unpack_zeros(qzeros, settings)
    off = (found != SYMMETRIC_ZERO).nonzero()
    if off.numel():
        zeros = found
        if settings.sym:
            group, column = (int(i) for i in off[0])
            problems.append(
                f"{name}: the config says sym, so every zero point must be 8, but group {group}, "
                f"column {column} has {int(found[group, column])}; if the layer is asymmetric, or "
                "its zeros are of the other checkpoint_format (gptq or gptq_v2), correct the "
                "config"
            )
    try:
        kept = cast_exactly(scales, dtype, name, "scales")
        kept_bias = cast_bias(bias, kept.dtype, dtype, name)
    except CheckpointError as error:
        problems += error.refusals
    if problems:
        raise CheckpointError(problems)
    return Parameters(kept, zeros, perm, kept_bias)


def pack_linear(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    settings: GptqSettings,
    *,
    dtype: torch.dtype | None = None,
    name: str = "layer",
) -> PackedWeight:
    """Convert one GPTQ layer, on the CPU: weights, scales, zeros and bias keep their values.

    Shapes and dtypes are those of this module's description. Raises :class:`CheckpointError` with
    every reason for which the layer cannot be converted.
    """
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    specs = {leaf: TensorSpec(value.dtype, tuple(value.shape)) for leaf, value in tensors.items()}
    if bias is not None:
        specs["bias"] = TensorSpec(bias.dtype, tuple(bias.shape))
    problems = layout_problems(name, specs, settings)
    if problems:
        raise CheckpointError(problems)
    rest = read_parameters(name, qzeros, scales, g_idx, bias, settings, dtype)
    packed: Tensor = torch.ops.marlin.repack_gptq(qweight.contiguous(), rest.perm)
    words, n = qweight.shape
    return PackedWeight(packed, rest.scales, rest.zeros, rest.perm, 8 * words, n, rest.bias)
