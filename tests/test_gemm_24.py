"""gemm_24: the product with a 2:4 sparse weight, against the dense expansion in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from operands import DTYPES, GROUP_SIZES, make_input, make_weight, make_weight_24
from torch import Tensor
from torch._subclasses import FakeTensorMode

from marlin import _inspect

ops = torch.ops.marlin

# Tails of quads, of blocks, of stages, of everything.
SHAPES = [
    (64, 128), (1, 4), (8, 12), (72, 200), (200, 332), (129, 1856), (65, 124), (127, 132),
    (1001, 260), (576, 384), (2880, 200), (64, 7396), (10944, 64), (28672, 128),
]  # fmt: skip
LARGE_SHAPES = [
    (576, 7168), (2880, 2880), (1856, 2688), (4640, 8192), (2048, 10944), (28672, 4096),
    (4096, 14336), (4096, 4096),
]  # fmt: skip


def check(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: str, **options: bool
) -> None:
    w = make_weight_24(n, k, group_size, dtype=dtype, device=device, **options)
    x = make_input(m, k, dtype=dtype, device=device)
    y = w.gemm(x)
    assert y.shape == (m, n)
    assert y.dtype == dtype
    reference.assert_close(y, x, w.dense64(), w.bias, group_size=w.group_size, sparse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for m in (1, 7, 16, 33):
        check(m, *shape, 128, dtype, device)
        check(m, *shape, 32, dtype, device, zeros=True, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_options(device: str, bias: bool, zeros: bool, group_size: int, dtype: torch.dtype) -> None:
    for n, k in ((192, 384), (200, 328), (77, 1300)):
        for m in (1, 3, 12, 17, 70, 130):
            check(m, n, k, group_size, dtype, device, zeros=zeros, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(device: str, dtype: torch.dtype) -> None:
    n, k = 136, 456
    w = make_weight_24(n, k, 64, dtype=dtype, device=device, zeros=True, bias=True)
    dense = w.dense64()
    for m in [*range(131), 200, 257, 1000, 4099]:
        x = make_input(m, k, dtype=dtype, device=device, seed=m)
        y = w.gemm(x)
        assert y.shape == (m, n)
        reference.assert_close(y, x, dense, w.bias, group_size=64, sparse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_shapes(shape: tuple[int, int]) -> None:
    symmetric = make_weight_24(*shape, 128, device="cuda")
    asymmetric = make_weight_24(*shape, 32, dtype=torch.bfloat16, device="cuda", zeros=True)
    for w in (symmetric, asymmetric):
        dense = w.dense64()
        for m in (1, 3, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 300):
            x = make_input(m, shape[1], dtype=w.scales.dtype, device="cuda", seed=m)
            reference.assert_close(w.gemm(x), x, dense, group_size=w.group_size, sparse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_one_hot_inputs_read_out_the_weight(
    device: str, group_size: int, dtype: torch.dtype
) -> None:
    """Token i is the i-th unit vector, so y is the transposed weight, to the last bit."""
    w = make_weight_24(136, 328, group_size, dtype=dtype, device=device, zeros=True)
    x = torch.eye(328, dtype=dtype, device=device)
    expected = w.dense64().T.float().to(dtype)
    assert torch.equal(w.gemm(x), expected)
    dense = ops.dequantize_24(w.qweight, w.meta, w.scales, w.zeros, k=328)
    assert torch.equal(expected, dense.T)
    for m in (5, 12, 24, 40):  # and through the kernels for few tokens
        for first in range(0, 328, m):
            rows = slice(first, first + m)
            assert torch.equal(w.gemm(x[rows]), expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k", [1024, 2904, 10956])
def test_sums_of_small_integers_are_exact(
    device: str, k: int, group_size: int, dtype: torch.dtype
) -> None:
    w = make_weight_24(
        136, k, group_size, dtype=dtype, device=device, zeros=True, bias=True, integers=True
    )
    g = torch.Generator().manual_seed(3)
    for m in (1, 8, 13, 32, 64, 100):
        x = torch.zeros(m, k)
        for token in range(m):  # few places, so that the output's rounding does nothing
            x[token, torch.randint(0, k, (1,), generator=g)] = 1 - 2 * (token % 2)
        x[:, -1] = 1
        x = x.to(dtype).to(device)
        assert torch.equal(w.gemm(x), w.gemm64(x).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_at_places_not_stored_do_not_matter(device: str, dtype: torch.dtype) -> None:
    """Of the first row's quads: other rows store other places, and see the difference. Finite ones,
    since a CPU multiplies them by zero."""
    w = make_weight_24(72, 264, 64, dtype=dtype, device=device, zeros=True)
    _, stored = ops.unpack_24(w.qweight, w.meta, 72, 264)
    elsewhere = ~stored[0]
    for m in (1, 12, 30, 70):
        x = make_input(m, 264, dtype=dtype, device=device)
        changed = torch.where(elsewhere, torch.finfo(dtype).max, x)
        assert torch.equal(w.gemm(changed)[:, 0], w.gemm(x)[:, 0])
        assert not torch.equal(w.gemm(changed), w.gemm(x))


def kernels() -> list[dict[str, Any]]:
    """Those that every GPU has; test_gemm_24_hopper.py tests the others."""
    return [kernel for kernel in _inspect.plans() if kernel["family"] == "sm80_24"]


@pytest.mark.gpu
@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sms", [0, 3], ids=["all-sms", "3-sms"])
def test_every_kernel(sms: int, dtype: torch.dtype, options: bool) -> None:
    """Also those that the planner keeps for other GPUs; and with long runs of work per block."""
    n, k = 712, 5000
    group_size = 32 if options else 128
    w = make_weight_24(n, k, group_size, dtype=dtype, device="cuda", zeros=options, bias=options)
    dense = w.dense64()
    inputs = [make_input(m, k, dtype=dtype, device="cuda") for m in (1, 11, 30, 61, 97, 150)]
    for kernel in kernels():
        _inspect.force_plan(kernel["id"], sms=sms)
        for x in inputs:
            y = w.gemm(x)
            reference.assert_close(y, x, dense, w.bias, rounded=False)
            assert torch.equal(w.gemm(x), y), kernel["name"]


@pytest.mark.gpu
@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_inputs_through_every_kernel(dtype: torch.dtype, group_size: int) -> None:
    """Every column of several blocks, every row, both selectors."""
    n, k = 200, 1100
    w = make_weight_24(n, k, group_size, dtype=dtype, device="cuda", zeros=True)
    x = torch.eye(k, dtype=dtype, device="cuda")
    expected = w.dense64().T.float().to(dtype)
    for kernel in kernels():
        _inspect.force_plan(kernel["id"])
        for m in (kernel["tokens"], k):
            for first in range(0, k, m):
                rows = slice(first, first + m)
                assert torch.equal(w.gemm(x[rows]), expected[rows]), kernel["name"]


@pytest.mark.gpu
@pytest.mark.usefixtures("planner")
def test_kernels_for_the_other_kind_of_weight_are_refused() -> None:
    x = make_input(3, 128, dtype=torch.float16, device="cuda")
    weights = {
        False: make_weight(64, 128, device="cuda"),
        True: make_weight_24(64, 128, device="cuda"),
    }
    for kernel in _inspect.plans():
        _inspect.force_plan(kernel["id"])
        other = weights[not kernel["sparse"]]
        with pytest.raises(
            RuntimeError, match=rf"kernel {kernel['id']} is for .* weights, this one is"
        ):
            other.gemm(x)


def test_equal_bits_every_time(device: str) -> None:
    for m, n, k in ((1, 1024, 4096), (16, 576, 7168), (33, 256, 2880), (130, 320, 1024)):
        w = make_weight_24(n, k, device=device)
        x = make_input(m, k, dtype=torch.float16, device=device)
        first = w.gemm(x)
        for _ in range(5):
            assert torch.equal(w.gemm(x), first)


def test_same_bits_whatever_the_threads() -> None:
    w = make_weight_24(576, 1856)
    x = make_input(33, 1856, dtype=torch.float16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = w.gemm(x)
        torch.set_num_threads(4)
        assert torch.equal(w.gemm(x), once)
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_strides(device: str) -> None:
    w = make_weight_24(72, 200, device=device, bias=True)
    x = make_input(6, 200, dtype=torch.float16, device=device)
    y = w.gemm(x)
    assert torch.equal(w.gemm(x[0])[None], w.gemm(x[:1]))
    assert torch.equal(w.gemm(x.view(2, 3, 200)), y.view(2, 3, 72))
    assert torch.equal(w.gemm(x.view(2, 3, 200).transpose(0, 1)), y.view(2, 3, 72).transpose(0, 1))
    assert w.gemm(x.view(6, 1, 200)[:, :0]).shape == (6, 0, 72)
    wide = torch.full((6, 456), float("nan"), dtype=torch.float16, device=device)
    for first in (0, 8, 3):  # the last starts between 16-byte boundaries
        columns = slice(first, first + 200)
        wide[:, columns] = x
        assert torch.equal(w.gemm(wide[:, columns]), y), "something leaked from beside the input"
        wide.fill_(float("nan"))
    assert torch.equal(w.gemm(x[:1].expand(5, 200)), w.gemm(x[:1].repeat(5, 1)))


def test_nothing_leaks_from_padding(device: str) -> None:
    """K that ends within a block, within 8 columns, or not; next to it there is no number."""
    for k in (72, 76, 124, 128, 132, 252):
        w = make_weight_24(72, k, 32, device=device, zeros=True)
        wide = torch.full((4, 256), float("nan"), dtype=torch.float16, device=device)
        wide[:, :k] = make_input(4, k, dtype=torch.float16, device=device)
        assert bool(w.gemm(wide[:, :k]).isfinite().all()), k


@pytest.mark.gpu
def test_misaligned_scales_and_zeros() -> None:
    """Tensors that start between 16-byte boundaries, as views into larger ones may."""
    w = make_weight_24(128, 256, 64, device="cuda", zeros=True)
    assert w.zeros is not None
    x = make_input(5, 256, dtype=torch.float16, device="cuda")
    expected = w.gemm(x)
    scales, zeros = misaligned(w.scales, 1), misaligned(w.zeros, 1)
    assert torch.equal(ops.gemm_24(x, w.qweight, w.meta, scales, w.zeros), expected)
    assert torch.equal(ops.gemm_24(x, w.qweight, w.meta, w.scales, zeros), expected)


def test_gradients(device: str) -> None:
    w = make_weight_24(72, 200, 64, device=device, zeros=True, bias=True)
    assert w.bias is not None
    x = make_input(7, 200, dtype=torch.float16, device=device).requires_grad_()
    w.bias.requires_grad_()
    grad = make_input(7, 72, dtype=torch.float16, device=device, seed=2)
    w.gemm(x).backward(grad)
    expected = grad @ ops.dequantize_24(w.qweight, w.meta, w.scales, w.zeros, k=200)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    torch.testing.assert_close(w.bias.grad, grad.sum(0))


def arguments() -> dict[str, Any]:
    w = make_weight_24(72, 136, 32, zeros=True, bias=True)
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


def misaligned(t: Tensor, elements: int) -> Tensor:
    """The same values, starting so many elements past an aligned address."""
    return torch.cat([t.flatten()[:elements], t.flatten()])[elements:].view(t.shape)


def falling_places(meta: Tensor) -> Tensor:
    """Row 17's first quad with its places 2 and 1: thread 32 + 4 of the first block, word 0."""
    bad = meta.clone()
    bad[0, 0, 36 * 2] = bad[0, 0, 36 * 2] & ~0xF | 0b0110
    return bad


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        (
            "qweight",
            lambda t: misaligned(t, 1),
            r"qweight must start at a 16-byte boundary; call qweight\.clone",
        ),
        (
            "meta",
            lambda t: misaligned(t, 2),
            r"meta must start at a 16-byte boundary; call meta\.clone",
        ),
        (
            "meta",
            falling_places,
            r"meta has the places 2, 1 for row 17, columns 0\.\.3; the first must be the smaller; "
            r"make it with pack_24",
        ),
    ],
    ids=["qweight-address", "meta-address", "places"],
)
def test_wrong_value(name: str, change: Callable[[Tensor], Tensor], pattern: str) -> None:
    """Faults of values or addresses, which fake tensors do not have."""
    with pytest.raises(RuntimeError, match=pattern):
        ops.gemm_24(**(arguments() | {name: change(arguments()[name])}))


@pytest.mark.gpu
def test_wrong_places_are_harmless_on_cuda() -> None:
    """They are not looked for there, since that would wait for the device: any output, no fault."""
    cuda = {name: tensor.cuda() for name, tensor in arguments().items()}
    for meta in (falling_places(cuda["meta"]), torch.full_like(cuda["meta"], -1)):
        assert ops.gemm_24(**cuda | {"meta": meta}).shape == (3, 72)
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    cuda = {name: tensor.cuda() for name, tensor in arguments().items()}
    for name in cuda:
        with pytest.raises(RuntimeError, match="move them to one device"):
            ops.gemm_24(**cuda | {name: cuda[name].cpu()})
