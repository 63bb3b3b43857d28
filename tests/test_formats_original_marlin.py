"""Tensors of the original Marlin kernel: exact, and a reason for each refusal."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import reference
import torch
from operands import make_input
from torch import Tensor

from marlin import CheckpointError, MarlinLinear
from marlin.formats.original_marlin import read_original_marlin


def write(q: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The tensors of integers 0..15 [N, K] and scales [G, N], word by word as the format's
    description has them: lane 4 col + t holds four words, one for each 16 x 16 tile.
    """
    n, k = q.shape
    values = q.tolist()
    words = torch.zeros(k // 16, 2 * n, dtype=torch.int64)
    for row in range(k // 16):
        for word in range(2 * n):
            chunk, inside = divmod(word, 128)
            lane, tile = divmod(inside, 4)
            col, t = divmod(lane, 4)
            for nibble, eighth in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                block, place = divmod(eighth, 4)
                feature = 64 * chunk + 16 * tile + 8 * block + col
                column = 16 * row + (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9)[place]
                words[row, word] |= values[feature][column] << 4 * nibble
    if scales.size(0) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    packed = scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
    return {"B": torch.where(words >= 2**31, words - 2**32, words).int(), "s": packed.contiguous()}


def make_tensors(
    n: int = 64, k: int = 384, groups: int = 3, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Any], Tensor]:
    """The tensors of a layer, and its weight in fp64 [N, K]."""
    g = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (n, k), generator=g).to(torch.uint8)
    scales = (torch.rand(groups, n, generator=g) * 0.02 + 0.001).to(dtype)
    group = torch.zeros(k, dtype=torch.long) if groups == 1 else torch.arange(k) // 128
    return write(q, scales), (q.double() - 8) * scales.double()[group].T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(64, 16, 1), (128, 128, 1), (64, 384, 3), (256, 256, 2), (64, 640, 1)]
)
def test_conversion_is_exact(device: str, n: int, k: int, groups: int, dtype: torch.dtype) -> None:
    tensors, weight = make_tensors(n, k, groups, dtype)
    bias = torch.randn(n).to(dtype)
    layer = MarlinLinear.from_original_marlin(
        **{name: t.to(device) for name, t in tensors.items()}, bias=bias.to(device)
    )
    assert layer.qweight.device.type == device
    assert (layer.out_features, layer.in_features) == (n, k)
    assert layer.group_size == (128 if groups > 1 else -1)
    assert layer.zeros is None
    assert torch.equal(layer.dequantize().cpu(), weight.to(dtype))
    assert layer.bias is not None
    assert torch.equal(layer.bias.cpu(), bias)
    x = make_input(5, k, dtype=dtype, device=device)
    reference.assert_close(layer(x), x, weight, layer.bias, rounded=False)


def test_tensors_of_the_original_writer() -> None:
    """Digests of what the published packing makes of these integers and scales."""
    g = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (256, 256), generator=g).to(torch.uint8)
    scales = (torch.rand(2, 256, generator=g) * 0.02 + 0.001).half()
    for groups, digest in ((2, "020f0dafc0959b06"), (1, "3fc37c69f5b4a328")):
        tensors = write(q, scales[:groups])
        found = {
            name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()
        }
        assert found["B"].startswith("b12f294753eb9e34")
        assert found["s"].startswith(digest)
        packed = read_original_marlin(tensors["B"], tensors["s"])
        assert torch.equal(reference.unpack(packed.qweight, 256, 256), q)
        assert torch.equal(packed.scales, scales[:groups])


def test_dtypes() -> None:
    tensors, weight = make_tensors()
    tensors["s"] = tensors["s"].float()
    with pytest.raises(CheckpointError, match=r"v: s: got float32 .*dtype=torch"):
        MarlinLinear.from_original_marlin(**tensors, layer="v")
    layer = MarlinLinear.from_original_marlin(**tensors, dtype=torch.float16)
    assert torch.equal(layer.dequantize(), weight.half())
    with pytest.raises(CheckpointError, match=r"bias: got .*to round the bias"):
        MarlinLinear.from_original_marlin(**make_tensors()[0], bias=torch.full((64,), 0.1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"B": torch.zeros(24, 128)}, r"v: B: got float32 \[24, 128\]; it must be int32"),
        ({"B": torch.zeros(24, dtype=torch.int32)}, r"v: B: got int32 \[24\]"),
        ({"B": torch.zeros(0, 128, dtype=torch.int32)}, r"v: B: got int32 \[0, 128\]"),
        ({"B": torch.zeros(24, 100, dtype=torch.int32)},
         r"v: B: got int32 \[24, 100\]; out_features is a multiple of 64"),
        ({"B": torch.zeros(24, 256, dtype=torch.int32)},
         r"v: s: got float16 \[3, 64\].*out_features=128, so it must be \[1, 128\] or \[3, 128\]"),
        ({"s": torch.zeros(2, 64).half()},
         r"v: s: got float16 \[2, 64\].*in_features=384.*\[1, 64\] or \[3, 64\]"),
        ({"s": torch.zeros(64).half()}, r"v: s: got float16 \[64\]"),
        ({"s": torch.zeros(3, 64).int()}, r"v: s: got int32 \[3, 64\]"),
        ({"s": torch.full((3, 64), float("nan")).half()}, "v: s: got nan"),
        ({"s": torch.zeros(3, 64, device="meta").half()}, "v: s: got a tensor on meta; B is on "),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Tensor], reason: str) -> None:
    tensors = {**make_tensors()[0], **changes}
    with pytest.raises(CheckpointError, match=reason):
        read_original_marlin(tensors["B"], tensors["s"], layer="v")
