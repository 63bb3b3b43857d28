"""What the checkpoint readers return, and the rules that they share: groups, and exact scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.errors import Refusal

GROUP_SIZES = (32, 64, 128)
COMPUTE_DTYPES = (torch.float16, torch.bfloat16)
SYMMETRIC_ZERO = 8
ALIGNMENT = 16  # bytes


class PackedWeight(NamedTuple):
    """One linear layer in the packed layout: the operands of ``torch.ops.marlin.gemm``.

    ``qweight`` int32 ``[ceil(N/64), ceil(K/64), 512]``; ``scales`` fp16 or bf16 ``[G, N]``;
    ``zeros`` uint8 ``[G, N]``, true zero points 0..15, or None (symmetric: 8 everywhere);
    ``perm`` int32 ``[K]``, packed column j multiplies input feature ``perm[j]``, or None;
    ``bias`` ``[N]`` in the dtype of the scales, or None. A 2:4 sparse layer, for ``gemm_24``, has
    ``places`` int32 ``[ceil(N/64), ceil(K/128), 256]``, half the blocks, and no ``perm``.
    K is ``in_features``, N is ``out_features``, G the number of groups.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    in_features: int
    out_features: int
    bias: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class Parameters:
    """All of a layer but its weight.

    scales [G, N]; zeros uint8 [G, N], None when all are 8; perm int32 [K], None when the features
    are in the order of their groups; bias [N] or None.
    """

    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: Tensor | None


def operands(
    in_features: int, out_features: int, groups: int, dtype: torch.dtype, *, sparse: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor that a packed layer may have; ``dtype`` is of its scales."""
    k, n = in_features, out_features
    blocks = -(-n // 64), -(-k // (128 if sparse else 64))
    parameters = {"scales": (dtype, (groups, n)), "zeros": (torch.uint8, (groups, n))}
    order = {"places": (torch.int32, (*blocks, 256))} if sparse else {"perm": (torch.int32, (k,))}
    return {
        "qweight": (torch.int32, (*blocks, 512)),
        **parameters,
        **order,
        "bias": (dtype, (n,)),
    }


def aligned(tensor: Tensor | None) -> Tensor | None:
    """``tensor``, or a copy where it starts off a 16-byte boundary, which the kernels need.

    Views of mapped files and slices do. Other kinds of tensor (traced ones) have no address.
    """
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def label(layer: str) -> str:
    """The start of an error message: ``"model.layers.0.q_proj: "``, or nothing."""
    return f"{layer}: " if layer else ""


def describe(tensor: Tensor) -> str:
    """``"int32 [4096, 512]"``: how error messages show what they got."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def group_count(in_features: int, group_size: int) -> int:
    """The number of groups G of a layer with ``in_features`` and the group size asked for.

    Raises:
        ValueError: ``group_size`` is not -1 (one group), 32, 64 or 128.
    """
    if group_size == -1:
        return 1
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size: got {group_size!r}; it must be 32, 64, 128, or -1 for one group per "
            "output feature; quantise the layer again with one of these"
        )
    return -(-in_features // group_size)


def group_size_of(in_features: int, groups: int, layer: str = "") -> int:
    """The group size that ``groups`` rows of scales mean: -1 for one group, else 32, 64 or 128.

    It is unique: ``ceil(K / g)`` differs between the sizes as soon as one of them exceeds 1.

    Raises:
        CheckpointError: no supported group size gives this number of groups.
    """
    if groups == 1:
        return -1
    for size in GROUP_SIZES:
        if -(-in_features // size) == groups:
            return size
    found = f"about {-(-in_features // groups)}" if groups > 0 else "none"
    raise CheckpointError(
        f"{label(layer)}scales: got {groups} groups for in_features={in_features} (group size "
        f"{found}); the group size must be 32, 64, 128, or one group for the whole row; quantise "
        "the layer again with one of these, or leave it out of the conversion"
    )


DTYPE_OPTION = "--dtype float16 or --dtype bfloat16"


def bias_problems(bias: Tensor | None, out_features: int, layer: str = "") -> list[str]:
    """What is wrong with the shape and dtype of a bias."""
    if bias is None or (bias.shape == (out_features,) and bias.is_floating_point()):
        return []
    return [
        f"{label(layer)}bias: got {describe(bias)}; it must be float [{out_features}], one for "
        "each output feature; the tensors are not of one layer"
    ]


def cast_bias(
    bias: Tensor | None, own: torch.dtype, asked: torch.dtype | None, layer: str = ""
) -> Tensor | None:
    """``bias``, if there is one, in ``own``, the dtype of the scales.

    It is rounded if a dtype was asked for; otherwise it must be exact.

    Raises:
        CheckpointError: an element is not finite in ``own``, or not exact and no dtype was asked.
    """
    if bias is None:
        return None
    if not bias.is_floating_point():
        raise CheckpointError(
            f"{label(layer)}bias: got {describe(bias)}; it must be float; the file is damaged"
        )
    rounded = bias.to(own)
    bad = torch.nonzero(~torch.isfinite(rounded))
    if len(bad):
        at = bad[0].tolist()
        raise CheckpointError(
            f"{label(layer)}bias: got {bias[tuple(at)].item()} at {at}; it must be finite in "
            f"{own}; repair the checkpoint, or pass dtype=torch.bfloat16 for values above "
            "float16's 65504"
        )
    bad = torch.nonzero(rounded.double() != bias.double())
    if asked is None and len(bad):
        at = bad[0].tolist()
        reason = (
            f"{label(layer)}bias: got {bias[tuple(at)].item()!r} at {at} in {bias.dtype}; {own}, "
            f"the dtype of the scales, cannot hold it exactly; pass dtype={own} to round the bias"
        )
        raise CheckpointError(Refusal(reason, option=DTYPE_OPTION))
    return rounded.contiguous()


def cast_exactly(tensor: Tensor, dtype: torch.dtype | None, layer: str, name: str) -> Tensor:
    """``tensor`` (scales) in ``dtype``, every element finite and unchanged.

    ``dtype`` None keeps the tensor's own. A conversion changes no weight: rounding is for the
    caller to do, beforehand, or afterwards with ``layer.to(dtype)``.

    Raises:
        CheckpointError: the dtype is not fp16 or bf16 and none was asked for, an element is NaN or
            infinite, or ``dtype`` cannot hold it exactly.
        TypeError: ``dtype`` is neither fp16 nor bf16.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{label(layer)}dtype: got {dtype}; scales and activations are torch.float16 or "
            "torch.bfloat16; pass one of the two"
        )
    if not tensor.is_floating_point() or (dtype is None and tensor.dtype not in COMPUTE_DTYPES):
        reason = (
            f"{label(layer)}{name}: got {describe(tensor)}; it must be float16 or bfloat16, the "
            "dtype of the activations; pass dtype=torch.float16 or dtype=torch.bfloat16 if the "
            "values are exact in it"
        )
        raise CheckpointError(Refusal(reason, option=DTYPE_OPTION))
    if not torch.isfinite(tensor).all():
        at = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        raise CheckpointError(
            f"{label(layer)}{name}: got {tensor[tuple(at)].item()} at {at}; every element must be "
            "finite; the file is damaged: fetch or quantise it again"
        )
    if dtype in (None, tensor.dtype):
        return tensor.contiguous()
    cast = tensor.to(dtype)
    bad = torch.nonzero(cast.double() != tensor.double())
    if len(bad):
        at = bad[0].tolist()
        fix = (
            f"pass dtype=None and round afterwards with layer.to({dtype})"
            if tensor.dtype in COMPUTE_DTYPES
            else f"round the tensor in the checkpoint first, with {name}.to({dtype})"
        )
        raise CheckpointError(
            f"{label(layer)}{name}: got {tensor[tuple(at)].item()!r} at {at}; {dtype} must hold "
            f"every element exactly; choose the other dtype, or {fix}"
        )
    return cast.contiguous()
