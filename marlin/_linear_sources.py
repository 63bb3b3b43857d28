"""Where the tensors of a packed layer come from: a float layer, or a GPTQ layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.gptq import GptqSettings, pack_linear
from marlin.formats.packed import PackedWeight, cast_bias, describe, group_size_of, label
from marlin.formats.sparse import pack_used
from marlin.quantize import check_weight, quantize_rtn

ZEROS_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def check_linear(linear: nn.Linear, layer: str = "") -> None:
    """Refuse a layer whose tensors are not of the sizes that it says, or whose bias is no float."""
    n, k = linear.out_features, linear.in_features
    if linear.weight.shape != (n, k):
        raise ValueError(
            f"{label(layer)}weight: got {describe(linear.weight)}; out_features={n} and "
            f"in_features={k} of the layer say [{n}, {k}]; set them to the weight's sizes"
        )
    bias = linear.bias
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
        raise ValueError(
            f"{label(layer)}bias: got {describe(bias)}; it must be float [{n}], as out_features "
            "says; repair it, or set it to None"
        )


def quantize_linear(
    linear: nn.Linear,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    choose: Callable[[Tensor], Tensor] | None = None,
    layer: str = "",
) -> PackedWeight:
    """Round a float layer to nearest; ``choose`` says which weights a 2:4 sparse one keeps."""
    weight = linear.weight.detach()
    check_weight(weight, dtype, layer)
    check_linear(linear, layer)
    kept = None if choose is None else choose(weight)
    if kept is not None:
        weight = weight.where(kept, 0)
    found = quantize_rtn(
        weight, group_size=group_size, symmetric=symmetric, dtype=dtype, layer=layer
    )
    k, n = linear.in_features, linear.out_features
    bias = None if linear.bias is None else cast_bias(linear.bias.detach(), dtype, dtype, layer)
    rest = (found.scales, found.zeros, None, k, n, bias)
    if kept is None:
        return PackedWeight(torch.ops.marlin.pack(found.q), *rest)
    qweight, places = pack_used(found.q, kept)
    return PackedWeight(qweight, *rest, places)


def read_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    checkpoint_format: str,
    sym: bool | None,
    zeros_carry: bool,
    dtype: torch.dtype | None,
    layer: str,
) -> PackedWeight:
    """See ``MarlinLinear.from_gptq``. Worked out on the CPU, returned on ``qweight``'s device."""
    if checkpoint_format not in ZEROS_VERSIONS:
        raise ValueError(
            f"{label(layer)}checkpoint_format: got {checkpoint_format!r}; it must be 'gptq' or "
            "'gptq_v2'; see quantization_config in the checkpoint's config.json"
        )
    named = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx, "bias": bias}
    problems = []
    for name, tensor in named.items():
        if tensor is not None and tensor.is_meta:
            problems.append(
                f"{label(layer)}{name}: got a meta tensor; its values are needed; load it first"
            )
        elif tensor is not None and name in ("qweight", "scales") and tensor.dim() != 2:
            problems.append(
                f"{label(layer)}{name}: got {describe(tensor)}; it must have 2 dimensions, "
                f"{'[in_features / 8' if name == 'qweight' else '[groups'}, out_features]"
            )
    if problems:
        raise CheckpointError(problems)
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
        dtype=dtype,
        name=layer or "layer",
    )
    zeros, perm, kept = (
        None if part is None else part.to(device) for part in (found.zeros, found.perm, found.bias)
    )
    return found._replace(
        qweight=found.qweight.to(device),
        scales=found.scales.to(device),
        zeros=zeros,
        perm=perm,
        bias=kept,
    )
