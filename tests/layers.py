"""Layers for the tests of MarlinLinear, and what is asked of two of them."""

from __future__ import annotations

import reference
import torch
from operands import make_weight, random_24, stored
from torch import Tensor, nn

from marlin import MarlinLinear, MarlinLinear24


def make_layer(n: int = 72, k: int = 200, group_size: int = 64, **options: object) -> MarlinLinear:
    weight = make_weight(n, k, group_size, **options)
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.perm, weight.bias)
    return MarlinLinear.from_packed(*tensors, in_features=k, out_features=n)


def make_layer_24(
    n: int = 72, k: int = 200, group_size: int = 64, *, device: str = "cpu", **options: object
) -> MarlinLinear24:
    return layer_and_weight_24(n, k, group_size, device=device, **options)[0]


def layer_and_weight_24(
    n: int = 72, k: int = 200, group_size: int = 64, *, device: str = "cpu", **options: object
) -> tuple[MarlinLinear24, Tensor]:
    """A random 2:4 sparse layer, and its weight in fp64 [N, K], from the same integers."""
    q, mask = random_24(n, k)
    rest = make_weight(n, k, group_size, **options)
    qweight, places = reference.pack_24(q, mask)
    group = reference.group_of_column(k, rest.scales.size(0))
    zero = 8.0 if rest.zeros is None else rest.zeros.double()[group].T
    dense = (q.double() - zero) * rest.scales.double()[group].T
    layer = MarlinLinear24.from_packed(
        qweight, places, rest.scales, rest.zeros, rest.bias, in_features=k, out_features=n
    )
    return layer.to(device), torch.where(stored(mask), dense, 0.0)


def make_linear(n: int, k: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Linear:
    generator = torch.Generator().manual_seed(n * 10007 + k)
    linear = nn.Linear(k, n, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def pruned_weight(n: int, k: int, seed: int = 0) -> Tensor:
    """Random numbers, none, one or two of every four, fp32 [N, K]."""
    _, mask = random_24(n, k, seed)
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return values.where(mask, 0)


Layer = MarlinLinear | MarlinLinear24


def buffers_of(layer: Layer) -> dict[str, Tensor]:
    return dict(layer.named_buffers())


def assert_same(one: Layer, other: Layer) -> None:
    assert buffers_of(one).keys() == buffers_of(other).keys()
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, buffers_of(other)[name]), name
    assert one.extra_repr() == other.extra_repr()


def assert_message(error: BaseException, *parts: str) -> None:
    for part in parts:
        assert part in str(error), f"{part!r} is not in: {error}"
