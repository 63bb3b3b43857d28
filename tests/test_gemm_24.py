"""gemm_24: the product with a 2:4 sparse weight, against the dense expansion in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from operands import DTYPES, GROUP_SIZES, groups_of, make_input, random_24, stored
from torch import Tensor
from torch._subclasses import FakeTensorMode

ops = torch.ops.marlin


class Weight24:
    """A random 2:4 weight: what the op takes, and the same weight dense in fp64.

    ``integers``: scales are powers of two, so that products with integers and their sums are exact.
    """

    def __init__(
        self,
        n: int,
        k: int,
        group_size: int = 128,
        *,
        dtype: torch.dtype = torch.float16,
        zeros: bool = False,
        bias: bool = False,
        integers: bool = False,
        seed: int = 0,
    ) -> None:
        q, mask = random_24(n, k, seed)
        g = torch.Generator().manual_seed(seed)
        groups = groups_of(k, group_size)
        scales = torch.rand(groups, n, generator=g) * 0.02 + 0.001
        if integers:
            scales = 2.0 ** torch.randint(-2, 3, (groups, n), generator=g)
        self.scales = scales.to(dtype)
        points = torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=g)
        self.zeros = points if zeros else None
        self.bias = torch.randint(-8, 9, (n,), generator=g).to(dtype) if bias else None
        self.qweight, self.meta = ops.pack_24(q, mask)
        group = reference.group_of_column(k, groups)
        zero = points.double()[group].T if zeros else 8.0
        weight = (q.double() - zero) * self.scales.double()[group].T
        self.dense64 = torch.where(stored(mask), weight, 0.0)

    def gemm(self, x: Tensor) -> Tensor:
        return ops.gemm_24(x, self.qweight, self.meta, self.scales, self.zeros, self.bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
def test_against_fp64(group_size: int, dtype: torch.dtype, options: bool) -> None:
    for n, k in ((64, 128), (1, 4), (72, 200), (200, 332), (129, 1856), (576, 384)):
        w = Weight24(n, k, group_size, dtype=dtype, zeros=options, bias=options)
        for m in (1, 3, 4, 17, 130):
            x = make_input(m, k, dtype=dtype)
            reference.assert_close(w.gemm(x), x, w.dense64, w.bias, rounded=False)


def test_every_number_of_tokens() -> None:
    w = Weight24(72, 200, 64, zeros=True, bias=True)
    x = make_input(130, 200, dtype=torch.float16)
    for m in range(131):
        y = w.gemm(x[:m])
        assert y.shape == (m, 72)
        reference.assert_close(y, x[:m], w.dense64, w.bias, rounded=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_one_hot_inputs_read_out_the_weight(group_size: int, dtype: torch.dtype) -> None:
    """Token i is the i-th unit vector, so y is the transposed weight, to the last bit."""
    w = Weight24(136, 328, group_size, dtype=dtype, zeros=True)
    y = w.gemm(torch.eye(328, dtype=dtype))
    assert torch.equal(y, w.dense64.T.float().to(dtype))
    dense = ops.dequantize_24(w.qweight, w.meta, w.scales, w.zeros, k=328)
    assert torch.equal(y, dense.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_small_integers_are_exact(dtype: torch.dtype) -> None:
    w = Weight24(136, 1024, 64, dtype=dtype, zeros=True, integers=True)
    g = torch.Generator().manual_seed(3)
    x = torch.zeros(40, 1024)
    for token in range(40):  # few places, so that the output's rounding does nothing
        x[token, torch.randint(0, 1024, (2,), generator=g)] = 1 - 2 * (token % 2)
    expected = x.double() @ w.dense64.T
    assert torch.equal(w.gemm(x.to(dtype)), expected.to(dtype))


def test_same_input_same_bits_whatever_the_threads() -> None:
    w = Weight24(576, 1856)
    x = make_input(33, 1856, dtype=torch.float16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = w.gemm(x)
        torch.set_num_threads(4)
        assert torch.equal(w.gemm(x), once)
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_strides() -> None:
    w = Weight24(72, 200, bias=True)
    x = make_input(6, 200, dtype=torch.float16)
    y = w.gemm(x)
    assert torch.equal(w.gemm(x[0]), y[0])
    assert torch.equal(w.gemm(x.view(2, 3, 200)), y.view(2, 3, 72))
    assert torch.equal(w.gemm(x.view(2, 3, 200).transpose(0, 1)), y.view(2, 3, 72).transpose(0, 1))
    assert torch.equal(w.gemm(torch.cat([x, x], 1)[:, :200]), y)
    assert w.gemm(x.view(6, 1, 200)[:, :0]).shape == (6, 0, 72)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
def test_opcheck(dtype: torch.dtype, options: bool) -> None:
    w = Weight24(136, 264, 64, dtype=dtype, zeros=options, bias=options)
    x = make_input(6, 264, dtype=dtype).view(2, 3, 264)
    weight = (w.qweight, w.meta, w.scales, w.zeros, w.bias)
    torch.library.opcheck(ops.gemm_24.default, (x, *weight))
    torch.library.opcheck(ops.gemm_24.default, (x, *weight), {"static_weights": True})
    torch.library.opcheck(ops.gemm_24.default, (x.detach().requires_grad_(), *weight))


def test_compile_without_breaks() -> None:
    w = Weight24(136, 264, 64, bias=True)

    def forward(x: Tensor) -> Tensor:
        return torch.relu(w.gemm(x * 2)) + 1

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = make_input(5, 264, dtype=torch.float16)
    assert torch.equal(compiled(x), forward(x))


def test_gradients() -> None:
    w = Weight24(72, 200, 64, zeros=True, bias=True)
    assert w.bias is not None
    x = make_input(7, 200, dtype=torch.float16).requires_grad_()
    w.bias.requires_grad_()
    grad = make_input(7, 72, dtype=torch.float16, seed=2)
    w.gemm(x).backward(grad)
    expected = grad @ ops.dequantize_24(w.qweight, w.meta, w.scales, w.zeros, k=200)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    torch.testing.assert_close(w.bias.grad, grad.sum(0))


def arguments() -> dict[str, Any]:
    w = Weight24(72, 136, 32, zeros=True, bias=True)
    x = make_input(3, 136, dtype=torch.float16)
    return {
        "input": x, "qweight": w.qweight, "meta": w.meta, "scales": w.scales, "zeros": w.zeros,
        "bias": w.bias,
    }  # fmt: skip


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


# (which argument, what is done to it, what the message must say)
CASES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("input", Tensor.float, r"input must be float16 or bfloat16, got float32; cast it"),
    ("input", Tensor.bfloat16, r"scales must have the dtype of input, bfloat16, got float16"),
    ("input", strided, r"input must have stride 1 along its last dimension, got 2"),
    ("input", lambda t: t[0, 0], r"input must have shape \[\.\.\., K\]"),
    ("input", lambda t: t[:, :134].contiguous(), r"K of input must be a multiple of 4, got 134"),
    (
        "input",
        lambda t: t[:, :64].contiguous(),
        r"holds 2 blocks of 128 input features, but K = 64",
    ),
    ("qweight", Tensor.long, r"qweight must be int32, got int64"),
    ("qweight", lambda t: t[0], r"got \[2, 512\]; make it with pack_24"),
    ("meta", Tensor.long, r"meta must be int32, got int64"),
    ("meta", lambda t: t[:1], r"meta must have shape \[2, 2, 256\], as qweight, got \[1, 2, 256\]"),
    ("meta", strided, r"meta must be contiguous"),
    ("scales", lambda t: t[:4], r"scales has G = 4 groups, but K = 136 makes 1, or 5, 3 or 2"),
    ("scales", strided, r"scales must be contiguous"),
    ("zeros", Tensor.int, r"zeros must be uint8, got int32"),
    ("bias", lambda t: t[:64], r"bias must have shape \[N\] = \[72\], got \[64\]"),
    ("bias", Tensor.float, r"bias must be float16, got float32"),
]


@pytest.mark.parametrize(("name", "change", "pattern"), CASES, ids=[c[2][:40] for c in CASES])
def test_wrong_argument(name: str, change: Callable[[Tensor], Tensor], pattern: str) -> None:
    bad = arguments() | {name: change(arguments()[name])}
    with pytest.raises(RuntimeError, match=pattern) as info:
        ops.gemm_24(**bad)
    message = str(info.value).splitlines()[0]
    assert message.startswith("marlin::gemm_24: ")
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(value) for key, value in bad.items()}
        with pytest.raises(RuntimeError) as fake:
            ops.gemm_24(**fakes)
    assert str(fake.value).splitlines()[0] == message


def misaligned(t: Tensor) -> Tensor:
    """The same values, starting 4 bytes past an aligned address."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def falling_places(meta: Tensor) -> Tensor:
    """Row 17's first quad with its places 2 and 1: thread 32 + 4 of the first block, word 0."""
    bad = meta.clone()
    bad[0, 0, 36 * 2] = bad[0, 0, 36 * 2] & ~0xF | 0b0110
    return bad


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        ("qweight", misaligned, r"qweight must start at a 16-byte boundary; call qweight\.clone"),
        (
            "meta",
            falling_places,
            r"meta has the places 2, 1 for row 17, columns 0\.\.3; the first must be the smaller; "
            r"make it with pack_24",
        ),
    ],
    ids=["address", "places"],
)
def test_wrong_value(name: str, change: Callable[[Tensor], Tensor], pattern: str) -> None:
    """Faults of values or addresses, which fake tensors do not have."""
    with pytest.raises(RuntimeError, match=pattern):
        ops.gemm_24(**(arguments() | {name: change(arguments()[name])}))
