"""Where the tensors of a ``MarlinLinear`` come from: a float layer, or a GPTQ layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from marlin.formats.gptq import GptqSettings, pack_linear
from marlin.formats.packed import PackedWeight, group_size_of, label
from marlin.quantize import quantize_rtn

ZEROS_VERSIONS = {"gptq": 1, "gptq_v2": 2}


class Source(NamedTuple):
    """A packed weight and the bias ``[N]`` beside it, in the dtype of the scales."""

    weight: PackedWeight
    bias: Tensor | None


def quantize_linear(
    linear: nn.Linear, group_size: int, symmetric: bool, dtype: torch.dtype
) -> Source:
    """See ``MarlinLinear.from_linear``."""
    found = quantize_rtn(linear.weight, group_size=group_size, symmetric=symmetric, dtype=dtype)
    qweight: Tensor = torch.ops.marlin.pack(found.q)
    weight = PackedWeight(
        qweight, found.scales, found.zeros, None, linear.in_features, linear.out_features
    )
    return Source(weight, None if linear.bias is None else _rounded(linear.bias, dtype))


def read_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    checkpoint_format: str,
    sym: bool | None,
    zeros_carry: bool,
    layer: str,
) -> Source:
    """See ``MarlinLinear.from_gptq``. Worked out on the CPU, returned on ``qweight``'s device."""
    if checkpoint_format not in ZEROS_VERSIONS:
        raise ValueError(
            f"{label(layer)}checkpoint_format: got {checkpoint_format!r}; it must be 'gptq' or "
            "'gptq_v2'; see quantization_config in the checkpoint's config.json"
        )
    k, device = 8 * qweight.size(0), qweight.device
    group_size = group_size_of(k, scales.size(0), layer)
    if g_idx is None:
        g_idx = torch.arange(k, dtype=torch.int32) // (k if group_size == -1 else group_size)
    settings = GptqSettings(group_size, sym, ZEROS_VERSIONS[checkpoint_format], zeros_carry)
    found = pack_linear(
        qweight.cpu(),
        qzeros.cpu(),
        scales.cpu(),
        g_idx.cpu(),
        None if bias is None else bias.cpu(),
        settings,
        name=layer or "layer",
    )
    zeros, perm, kept = (
        None if part is None else part.to(device) for part in (found.zeros, found.perm, found.bias)
    )
    weight = PackedWeight(
        found.qweight.to(device), found.scales.to(device), zeros, perm, k, scales.size(1)
    )
    return Source(weight, kept)


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias`` in ``dtype``; what is not finite in it is refused."""
    bias = bias.detach()
    rounded = bias.to(dtype)
    bad = torch.nonzero(~torch.isfinite(rounded))
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"bias: got {float(bias[at])} at {at}; it must be finite in {dtype}; repair the "
            "checkpoint, or pass dtype=torch.bfloat16 for values above float16's 65504"
        )
    return rounded
