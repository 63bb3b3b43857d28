"""Layers for the tests of MarlinLinear, and what is asked of two of them."""

from __future__ import annotations

import torch
from operands import make_weight
from torch import Tensor, nn

from marlin import MarlinLinear


def make_layer(n: int = 72, k: int = 200, group_size: int = 64, **options: object) -> MarlinLinear:
    weight = make_weight(n, k, group_size, **options)
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.perm, weight.bias)
    return MarlinLinear.from_packed(*tensors, in_features=k, out_features=n)


def make_linear(n: int, k: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Linear:
    generator = torch.Generator().manual_seed(n * 10007 + k)
    linear = nn.Linear(k, n, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def buffers_of(layer: MarlinLinear) -> dict[str, Tensor]:
    return dict(layer.named_buffers())


def assert_same(one: MarlinLinear, other: MarlinLinear) -> None:
    assert buffers_of(one).keys() == buffers_of(other).keys()
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, buffers_of(other)[name]), name
    assert one.extra_repr() == other.extra_repr()


def assert_message(error: BaseException, *parts: str) -> None:
    for part in parts:
        assert part in str(error), f"{part!r} is not in: {error}"
