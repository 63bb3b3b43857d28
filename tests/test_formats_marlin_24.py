"""compressed-tensors ``marlin-24`` tensors: exact, and a reason for each refusal."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import reference
import torch
from operands import make_input
from torch import Tensor

from marlin import CheckpointError, MarlinLinear24
from marlin.formats.marlin_24 import read_marlin_24


def make_weight(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Integers -8..7 [N, K] of a 2:4 weight, and its places, two rising ones of every four."""
    g = torch.Generator().manual_seed(seed)
    places = torch.rand(n, k // 4, 4, generator=g).argsort(-1)[..., :2].sort(-1).values
    values = torch.randint(-8, 8, (n, k // 4, 2), generator=g)
    weight = torch.zeros(n, k // 4, 4, dtype=torch.int64).scatter(2, places, values)
    return weight.view(n, k), places


def write(weight: Tensor, places: Tensor, scales: Tensor) -> dict[str, Any]:
    """The tensors, all words at once, nibble by nibble as the format's documentation has them."""
    n, k = weight.shape
    stored = weight.view(n, k // 4, 4).gather(2, places).view(n, k // 2) + 8
    quads = places[..., 0] | places[..., 1] << 2
    row, word = torch.arange(k // 32)[:, None], torch.arange(2 * n)
    chunk, inside = word // 128, word % 128
    packed = torch.zeros(k // 32, 2 * n, dtype=torch.int64)
    col, t, j = inside // 16, inside // 4 % 4, inside % 4
    for f in range(8):
        h, b, r = f // 4, f // 2 % 2, f % 2
        feature, column = 64 * chunk + 8 * col + 4 * b + j, 16 * row + 8 * r + 2 * t + h
        packed |= stored[feature, column] << 4 * f
    meta = torch.zeros(k // 32, 2 * n, dtype=torch.int64)
    b2, a, b1, s, b4 = (inside >> shift & mask for shift, mask in
                        ((6, 1), (3, 7), (2, 1), (1, 1), (0, 1)))  # fmt: skip
    feature = 64 * chunk + 8 * a + 4 * b4 + 2 * b2 + b1
    for quad in range(4):
        meta |= quads[feature, 8 * row + 4 * s + quad] << 4 * quad
    order = torch.arange(n).view(-1, 2, 4).transpose(1, 2).reshape(-1)
    return {
        "weight_packed": torch.where(packed >= 2**31, packed - 2**32, packed).int(),
        "meta": torch.where(meta >= 2**15, meta - 2**16, meta).to(torch.int16),
        "scale_packed": scales[:, order].contiguous() if scales.size(0) > 1 else scales,
    }


def make_tensors(n: int = 64, k: int = 384, groups: int = 3) -> tuple[dict[str, Any], Tensor]:
    """The tensors of a layer, and its weight in fp64 [N, K]."""
    weight, places = make_weight(n, k)
    g = torch.Generator().manual_seed(1)
    scales = (torch.rand(groups, n, generator=g) * 0.02 + 0.001).half()
    tensors = write(weight, places, scales)
    return tensors, weight.double() * scales.double().repeat_interleave(k // groups, 0).T


@pytest.mark.parametrize(("n", "k", "groups"), [(64, 32, 1), (128, 384, 3), (64, 640, 1)])
def test_conversion_is_exact(device: str, n: int, k: int, groups: int) -> None:
    tensors, weight = make_tensors(n, k, groups)
    bias = torch.randn(n).half()
    layer = MarlinLinear24.from_marlin_24(
        **{name: t.to(device) for name, t in tensors.items()}, bias=bias.to(device)
    )
    assert layer.qweight.device.type == device
    assert (layer.out_features, layer.in_features) == (n, k)
    assert layer.group_size == (128 if groups > 1 else -1)
    assert layer.zeros is None
    assert torch.equal(layer.dequantize().cpu(), weight.half())
    assert torch.equal(layer.bias.cpu(), bias)
    x = make_input(5, k, dtype=torch.float16, device=device)
    reference.assert_close(layer(x), x, weight, layer.bias, rounded=False)


def test_tensors_of_the_original_writer() -> None:
    """Digests of what compressed-tensors' own packing makes of this weight."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randint(-8, 8, (64, 64), generator=g)
    rank = torch.rand(64, 16, 4, generator=g).argsort(-1).argsort(-1)
    weight *= (rank < 2).view(64, 64)
    few = {(): (2, 3), (3,): (2, 3), (2,): (2, 3), (1,): (1, 2), (0,): (0, 2)}  # its own rule
    places = torch.zeros(64, 16, 2, dtype=torch.int64)
    for row, quads in enumerate(weight.view(64, 16, 4).tolist()):
        for quad, values in enumerate(quads):
            found = tuple(place for place in range(4) if values[place])
            places[row, quad] = torch.tensor(few.get(found, found))
    tensors = write(weight, places, torch.ones(1, 64).half())
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    assert digests["weight_packed"].startswith("9693cca8fda95929")
    assert digests["meta"].startswith("c2abdbe701b87c15")
    layer = MarlinLinear24.from_marlin_24(**tensors)
    assert torch.equal(layer.dequantize(), weight.half())


def test_dtypes() -> None:
    tensors, weight = make_tensors()
    tensors["scale_packed"] = tensors["scale_packed"].float()
    with pytest.raises(CheckpointError, match=r"v: scale_packed: got float32 .*dtype=torch"):
        read_marlin_24(**tensors, layer="v")
    layer = MarlinLinear24.from_marlin_24(**tensors, dtype=torch.float16)
    assert torch.equal(layer.dequantize(), weight.half())
    with pytest.raises(CheckpointError, match=r"bias: got .*to round the bias"):
        MarlinLinear24.from_marlin_24(**make_tensors()[0], bias=torch.full((64,), 0.1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_packed": torch.zeros(12, 128)}, r"v: weight_packed: got float32 \[12, 128\]"),
        ({"weight_packed": torch.zeros(12, dtype=torch.int32)}, r"weight_packed: got int32 \[12\]"),
        ({"weight_packed": torch.zeros(0, 128, dtype=torch.int32)}, r"got int32 \[0, 128\]"),
        ({"weight_packed": torch.zeros(12, 100, dtype=torch.int32)},
         r"weight_packed: got int32 \[12, 100\].*multiple of 64"),
        ({"weight_packed": torch.zeros(12, 256, dtype=torch.int32)},
         r"meta: got int16 \[12, 128\]; it must be int16 \[12, 256\]"),
        ({"meta": torch.zeros(12, 128, dtype=torch.int32)}, r"v: meta: got int32 \[12, 128\]"),
        ({"scale_packed": torch.zeros(2, 64).half()},
         r"scale_packed: got float16 \[2, 64\].*in_features=384.*\[1, 64\] or \[3, 64\]"),
        ({"scale_packed": torch.full((3, 64), float("nan")).half()}, r"v: scale_packed: got nan"),
        ({"meta": torch.zeros(12, 128, dtype=torch.int16)},
         r"v: meta: got the places 0, 0 for row 0, columns 0\.\.3; the first must be the smaller"),
        ({"meta": torch.zeros(12, 128, dtype=torch.int16, device="meta")},
         r"v: meta: got a tensor on meta; weight_packed is on cpu"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_marlin_24(**{**make_tensors()[0], **changes}, layer="v")


def test_small_layers_of_two_groups_are_refused() -> None:
    tensors, _ = make_tensors(64, 256, 2)
    with pytest.raises(
        CheckpointError, match=r"got 2 groups for in_features=256; writers .*differ"
    ):
        read_marlin_24(**tensors)
