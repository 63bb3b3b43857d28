"""Round-to-nearest quantisation of a weight to 4 bits: no data needed, one pass.

The scale of a group is the smallest one that keeps *every* weight of the group within half a step
of a code. Symmetric codes q - 8 run from -8 to 7 and so reach, with half a step of slack, from
-8.5 s to 7.5 s: ``s = max(max(w) / 7.5, -min(w) / 8.5)``. On normal weights with groups of 128 its
mean squared error is 19% below ``max|w| / 7`` and 9% below ``max|w| / 7.5`` (the rule of GPTQ's
and compressed-tensors' tools): no weight loses, the step is just not wider than it must be.
Asymmetric: ``s = (max(w, 0) - min(w, 0)) / 15``, ``z = round(-min(w, 0) / s)``, an integer.

The scale is rounded *up* to its storage dtype before any weight is divided by it. So the codes fit
the scale that the kernel will use, the half step holds exactly, and a scale is never 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marlin.formats.packed import COMPUTE_DTYPES, SYMMETRIC_ZERO, describe, group_count, label

_CHUNK_ELEMENTS = 1 << 24  # rows are taken in chunks, so temporaries stay near 64 MiB each


class QuantizedWeight(NamedTuple):
    """Codes and parameters, not packed: ``w[n, k] ~ (q[n, k] - zeros[g, n]) * scales[g, n]``.

    ``q`` uint8 ``[N, K]`` of 0..15; ``scales`` fp16 or bf16 ``[G, N]``; ``zeros`` uint8 ``[G, N]``
    of 0..15, or None for 8 everywhere. G = ceil(K / group_size); the last group may be partial.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantize_rtn(
    weight: Tensor,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    layer: str = "",
) -> QuantizedWeight:
    """Quantise ``weight`` ``[N, K]`` (fp16, bf16, fp32 or fp64, any device) to 4 bits.

    Args:
        weight: the weight, output features first, as in ``torch.nn.Linear``.
        group_size: input features that share a scale: 32, 64, 128, or -1 for all of them.
        symmetric: zero point 8 for every group; otherwise one integer zero point per group.
        dtype: of the scales, and so of the activations later: ``torch.float16`` or ``bfloat16``.
        layer: name of the layer, for error messages.

    Raises:
        TypeError: ``weight`` is not floating point, or ``dtype`` is not fp16 or bf16.
        ValueError: ``weight`` is not a non-empty matrix, holds NaN or infinity, or is too large
            for ``dtype``; or ``group_size`` is not supported.
    """
    check_weight(weight, dtype, layer)
    n, k = weight.shape
    groups = group_count(k, group_size)
    width = k if groups == 1 else group_size
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(groups, n, dtype=dtype, device=weight.device)
    zeros = None if symmetric else torch.empty(groups, n, dtype=torch.uint8, device=weight.device)
    accurate = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = max(1, _CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        chunk = weight.detach()[start:stop].to(accurate)
        # Both rules include 0 in the range, so the zeros of a partial last group change nothing.
        chunk = torch.nn.functional.pad(chunk, (0, groups * width - k))
        chunk = chunk.view(stop - start, groups, width)
        low = chunk.amin(-1).clamp(max=0)  # amin and amax pass NaN on
        high = chunk.amax(-1).clamp(min=0)
        _check_finite(low, high, start, layer)
        if symmetric:
            step = torch.maximum(_quotient(high, 7.5), _quotient(low, -8.5))
        else:
            step = _quotient(high - low, 15)
        step = _round_up(torch.where(step == 0, 1.0, step), dtype)
        exact = step.to(accurate)
        zero = torch.full_like(exact, SYMMETRIC_ZERO) if symmetric else (low / -exact).round_()
        _check_range(exact, zero, low, high, start, dtype, layer)
        codes = chunk.div_(exact.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, 15)
        q[start:stop] = codes.view(stop - start, -1)[:, :k].to(torch.uint8)
        scales[:, start:stop] = step.T
        if zeros is not None:
            zeros[:, start:stop] = zero.T.to(torch.uint8)
    return QuantizedWeight(q, scales, zeros)


def _quotient(dividend: Tensor, divisor: float) -> Tensor:
    """``dividend / divisor``, correctly rounded on every device.

    On a GPU, torch divides by a Python number by multiplying with its inverse, which may round
    otherwise than the CPU does.
    """
    return dividend / dividend.new_full((), divisor)


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """``step`` (positive) in ``dtype``, rounded towards +infinity: never 0."""
    rounded = step.to(dtype)
    # The bits of a positive float, plus one, are the next float: 0 becomes the smallest subnormal.
    above = (rounded.view(torch.int16) + 1).view(dtype)
    return torch.where(rounded.to(step.dtype) < step, above, rounded)


def check_weight(weight: Tensor, dtype: torch.dtype, layer: str) -> None:
    """Refuse what is not a matrix of floats, and a dtype that scales cannot have."""
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(
            f"{label(layer)}weight: got {describe(weight)}; round-to-nearest reads float16, "
            "bfloat16, float32 or float64; dequantise the weight first, or convert its checkpoint"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"{label(layer)}weight: got {describe(weight)}; it must be a matrix [out_features, "
            "in_features] with at least one of each; leave this layer unquantised"
        )
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{label(layer)}dtype: got {dtype}; scales and activations are torch.float16 or "
            "torch.bfloat16; pass one of the two"
        )


def _check_finite(low: Tensor, high: Tensor, first_row: int, layer: str) -> None:
    bad = torch.nonzero(~(torch.isfinite(low) & torch.isfinite(high)))
    if len(bad):
        row, group = (int(i) for i in bad[0])
        raise ValueError(
            f"{label(layer)}weight: got NaN or infinity in output feature {first_row + row}, "
            f"group {group}; every weight must be finite; repair the checkpoint, or leave this "
            "layer unquantised"
        )


def _check_range(
    step: Tensor,
    zero: Tensor,
    low: Tensor,
    high: Tensor,
    first_row: int,
    dtype: torch.dtype,
    layer: str,
) -> None:
    """Refuse groups whose outermost codes would dequantise to infinity."""
    reach = torch.maximum(zero, 15 - zero) * step
    bad = torch.nonzero(reach > torch.finfo(dtype).max)
    if len(bad):
        row, group = (int(i) for i in bad[0])
        largest = float(torch.maximum(high, -low)[row, group])
        fix = (
            "pass dtype=torch.bfloat16"
            if dtype == torch.float16
            else "rescale the weight, or leave this layer unquantised"
        )
        raise ValueError(
            f"{label(layer)}weight: got magnitude {largest:g} in output feature "
            f"{first_row + row}, group {group}; its codes must stay within {dtype}'s largest "
            f"number, {torch.finfo(dtype).max:g}; {fix}"
        )
