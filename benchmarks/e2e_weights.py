"""Random linear layers of every variant that ``e2e`` compares, made on the device.

A layer's outputs have a variance of about one where its inputs have, so that no model overflows,
however deep. All bits are random: what they are decides the power that a GPU draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import gemm
from benchmarks.e2e_model import DTYPE, MakeLinear, random_parameter
from marlin import MarlinLinear, MarlinLinear24

GROUP_SIZE = 128
CODES_MEAN_SQUARE = 21.5  # of q - 8, q uniform in 0..15
SCALES_MEAN_SQUARE = 0.01**2 / 3  # of gemm.random_weight's


def random_bias(n: int, bias: bool, device: str) -> Tensor | None:
    """Small, where there is one."""
    return random_parameter(n, device=device, std=0.1).detach() if bias else None


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """``nn.Linear`` around tensors."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def fp16_linear(n: int, k: int, bias: bool, device: str) -> nn.Linear:
    """The baseline: cuBLAS."""
    weight = random_parameter(n, k, device=device, std=k**-0.5)
    return dense_linear(weight, random_bias(n, bias, device))


def scale_to_unit(scales: Tensor, stored_k: int) -> Tensor:
    """Random scales of a weight, made so large that its outputs have a variance of one.

    Of either sign: codes are -0.5 in the mean, which would add up over the layers.
    """
    signs = torch.randint(0, 2, scales.shape, device=scales.device).mul_(2).sub_(1)
    return scales.mul_((stored_k * CODES_MEAN_SQUARE * SCALES_MEAN_SQUARE) ** -0.5).mul_(signs)


def marlin_linear(n: int, k: int, bias: bool, device: str) -> MarlinLinear:
    """4-bit, symmetric."""
    qweight, scales, _ = gemm.random_weight(n, k, GROUP_SIZE, DTYPE, False, device)
    return MarlinLinear.from_packed(
        qweight,
        scale_to_unit(scales, k),
        bias=random_bias(n, bias, device),
        in_features=k,
        out_features=n,
    )


def marlin_24_linear(n: int, k: int, bias: bool, device: str) -> MarlinLinear24:
    """4-bit, symmetric, 2:4 sparse; every layer has places of its own."""
    qweight, scales, _ = gemm.random_weight(n, k // 2, GROUP_SIZE // 2, DTYPE, False, device)
    return MarlinLinear24.from_packed(
        qweight,
        gemm.random_places(n, k, device),
        scale_to_unit(scales, k // 2),
        bias=random_bias(n, bias, device),
        in_features=k,
        out_features=n,
    )


@dataclass(frozen=True)
class Variant:
    """How the linear layers of a model are made, and the bits that a weight then takes."""

    make: MakeLinear
    bits: float


VARIANTS = {  # the baseline first
    "fp16": Variant(fp16_linear, 16),
    "marlin": Variant(marlin_linear, 4 + 16 / GROUP_SIZE),
    "marlin-24": Variant(marlin_24_linear, 3 + 16 / GROUP_SIZE),
}
