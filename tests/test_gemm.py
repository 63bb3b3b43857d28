"""torch.ops.marlin.gemm against fp64: every M, odd shapes, every option, exact where it can be."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from operands import DTYPES, GROUP_SIZES, Maker, Weight, make_input, make_weight, make_weight_24

# Tails of blocks, of stages, of everything, and layer shapes that are no multiples of a tile.
SHAPES = [
    (64, 64), (72, 200), (200, 72), (1, 1), (3, 8), (8, 3), (65, 129), (127, 63), (1001, 333),
    (576, 1856), (1856, 576), (2880, 200), (200, 2880), (72, 4640), (4640, 72), (64, 7392),
    (10944, 64), (64, 10944), (28672, 64), (64, 28672),
]  # fmt: skip
LARGE_SHAPES = [
    (576, 7168), (2880, 2880), (1856, 2688), (4640, 8192), (8192, 7392), (2048, 10944),
    (28672, 4096), (4096, 28672), (4096, 4096),
]  # fmt: skip
EVERY_M = [*range(131), 255, 256, 257, 258]


def check(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: str, **options: bool
):
    weight = make_weight(n, k, group_size, dtype=dtype, device=device, **options)
    x = make_input(m, k, dtype=dtype, device=device)
    y = weight.gemm(x)
    assert y.shape == (m, n)
    assert y.dtype == dtype
    reference.assert_close(y, x, weight.dense64(), weight.bias, group_size=weight.group_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_m(device: str, dtype: torch.dtype) -> None:
    n, k = 136, 456
    weight = make_weight(n, k, 64, dtype=dtype, device=device, zeros=True, bias=True)
    dense = weight.dense64()
    for m in [*EVERY_M, 1024, 4099]:
        x = make_input(m, k, dtype=dtype, device=device, seed=m)
        reference.assert_close(weight.gemm(x), x, dense, weight.bias, group_size=64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for m in (1, 7, 16, 33):
        check(m, *shape, 128, dtype, device)
        check(m, *shape, 32, dtype, device, zeros=True, perm=True, bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_shapes(shape: tuple[int, int]) -> None:
    weight = make_weight(*shape, 128, device="cuda")
    asymmetric = make_weight(*shape, 32, dtype=torch.bfloat16, device="cuda", zeros=True, perm=True)
    for w in (weight, asymmetric):
        dense = w.dense64()
        for m in (1, 3, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 300):
            x = make_input(m, shape[1], dtype=w.scales.dtype, device="cuda", seed=m)
            reference.assert_close(w.gemm(x), x, dense, group_size=w.group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("perm", [False, True], ids=["plain", "actorder"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(device: str, dtype: torch.dtype, perm: bool, zeros: bool, group_size: int) -> None:
    for m in (1, 5, 16, 40, 70):
        for n, k in ((192, 384), (200, 328), (77, 301)):
            check(m, n, k, group_size, dtype, device, zeros=zeros, perm=perm, bias=perm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k", [1024, 2904, 10952])
def test_exact_sums_are_exact(device: str, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Few small integers times scales that are powers of two: nothing needs to be rounded."""
    n = 136
    weight = make_weight(
        n, k, group_size, dtype=dtype, device=device, zeros=True, bias=True, integers=True
    )
    g = torch.Generator().manual_seed(k)
    for m in (1, 8, 13, 32, 64, 100):
        x = torch.zeros(m, k)
        for token in range(m):  # a one or minus one in one place: 4 bits, a scale, a bias
            x[token, torch.randint(0, k, (1,), generator=g)] = 1 - 2 * (token % 2)
        x[:, -1] = 1  # and the last column
        x = x.to(dtype).to(device)
        expected = reference.gemm64(
            x, weight.qweight, weight.scales, weight.zeros, weight.perm, weight.bias
        )
        assert torch.equal(weight.gemm(x), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("perm", [False, True], ids=["plain", "actorder"])
def test_one_hot_inputs_read_out_the_weight(
    device: str, dtype: torch.dtype, perm: bool, group_size: int
) -> None:
    """Token i is the i-th unit vector, so y is the transposed weight, to the last bit."""
    n, k = 136, 328
    weight = make_weight(n, k, group_size, dtype=dtype, device=device, zeros=True, perm=perm)
    x = torch.eye(k, dtype=dtype, device=device)
    expected = weight.dense64().T.float().to(dtype)
    assert torch.equal(weight.gemm(x), expected)
    for m in (5, 12, 24, 40, 60, 72, 90, 104, 120):  # and through the kernels for few tokens
        for first in range(0, k, m):
            rows = slice(first, first + m)
            assert torch.equal(weight.gemm(x[rows]), expected[rows])


def check_every_kernel(weight: Weight, sms: int) -> None:
    """Also those that the planner keeps for other GPUs; with blocks that share tiles, and not."""
    from marlin import _inspect

    dense, k, dtype = weight.dense64(), weight.k, weight.scales.dtype
    ms = (1, 6, 11, 30, 61, 97, 150, 257, 450, 1000)  # of small layers many tiles of tokens
    inputs = [make_input(m, k, dtype=dtype, device="cuda") for m in ms]
    try:
        for kernel in _inspect.plans():
            family = kernel["family"]
            if kernel["sparse"]:
                continue
            if family != "sm80" and torch.cuda.get_device_capability() != (9, 0):
                continue
            for shares in kernel["shares"]:
                _inspect.force_plan(kernel["id"], sms=sms, shares=shares)
                for x in inputs:
                    if kernel["any_m"] or x.shape[0] <= kernel["tokens"]:
                        rounded = reference.kernel_rounds(kernel, weight.group_size)
                        reference.assert_close(
                            weight.gemm(x), x, dense, weight.bias, rounded=rounded
                        )
    finally:
        _inspect.force_plan()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sms", [0, 5, 7], ids=["all-sms", "5-sms", "7-sms"])
def test_every_kernel(sms: int, dtype: torch.dtype, options: bool) -> None:
    """With long runs of work per block."""
    weight = make_weight(
        776, 5000, 32 if options else 128, dtype=dtype, device="cuda",
        zeros=options, perm=options, bias=options,
    )  # fmt: skip  # rows that make an odd number of tiles, of 64 and of 128, and half a tile
    check_every_kernel(weight, sms)


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_kernel_with_every_group_size(group_size: int, zeros: bool) -> None:
    """Kernels have a loop of their own for symmetric weights, those for many tokens only where
    scales are far enough apart."""
    weight = make_weight(776, 1000, group_size, dtype=torch.float16, device="cuda", zeros=zeros)
    check_every_kernel(weight, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_cut_in_halves(dtype: torch.dtype) -> None:
    """Pairs that share half a tile, a tile and half a tile, and those with whole ones beside."""
    from marlin import _inspect

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    kernels = [kernel for kernel in _inspect.plans() if kernel["cuts_tiles"]]
    assert kernels
    pairs = 3
    try:
        # One stage of k, of which the second block of a pair has none; an odd number of stages.
        for each, halves, k in itertools.product(range(5), range(1, pairs + 1), (100, 1400)):
            n = 64 * (2 * pairs * each + halves) - 8  # `each` tiles for every pair
            weight = make_weight(n, k, 64, dtype=dtype, device="cuda", integers=True, zeros=True)
            x = torch.randint(-1, 2, (64, k), device="cuda").to(dtype)
            wanted = (x.double() @ weight.dense64().T).to(dtype)
            results = []
            for kernel in kernels:
                _inspect.force_plan(kernel["id"], sms=2 * pairs, shares=True)
                for m in (1, kernel["tokens"] - 1, kernel["tokens"]):
                    for static_weights in (False, True, True):  # that may start early
                        y = weight.gemm(x[:m], static_weights=static_weights)
                        results.append((kernel["name"], y))
            for name, y in results:
                assert torch.equal(y, wanted[: len(y)]), (each, halves, k, name, len(y))
    finally:
        _inspect.force_plan()


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [0, 400], ids=["all-sms", "400-sms"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "24"])
def test_tiles_shared_over_memory(sparse: bool, sms: int) -> None:
    """Blocks leave partial sums, and flags, in scratch that holds anything: on several streams at
    once, in a graph, and with what earlier launches have left there, always the same bits. Also
    with more blocks than run at once."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper kernels share tiles so")
    from marlin import _inspect

    make: Maker = make_weight_24 if sparse else make_weight
    weight = make(5056, 2048, 128, dtype=torch.float16, device="cuda")
    dense = weight.dense64()
    streams = [torch.cuda.Stream() for _ in range(4)]
    kernels = [k for k in _inspect.plans() if k["shares_over_memory"] and k["sparse"] is sparse]
    assert kernels
    try:
        for kernel in kernels:
            _inspect.force_plan(kernel["id"], sms=sms, shares=True)
            ms = [max(kernel["tokens"] - 1, 1)]  # less than a tile a block
            if kernel["any_m"]:
                ms.append(16 * kernel["tokens"] + 5)  # more
            for m in ms:
                x = make_input(m, 2048, dtype=torch.float16, device="cuda")
                expected = weight.gemm(x)
                rounded = reference.kernel_rounds(kernel, weight.group_size)
                reference.assert_close(expected, x, dense, rounded=rounded)
                torch.cuda.synchronize()
                results = []
                for i in range(100 if sms else 400):
                    with torch.cuda.stream(streams[i % 4]):
                        for size in (2**17, 2**20, 2**21):  # what is freed here is scratch next
                            torch.randint(-(2**62), 2**62, (size,), device="cuda")
                        y = weight.gemm(x, static_weights=i % 3 > 0)  # which may start early
                        results.append((y == expected).all())
                torch.cuda.synchronize()
                assert all(results)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    outputs = [weight.gemm(x, static_weights=i % 3 > 0) for i in range(20)]
                for _ in range(20):
                    graph.replay()
                    assert all(torch.equal(y, expected) for y in outputs)
    finally:
        _inspect.force_plan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_inputs_through_every_kernel(dtype: torch.dtype) -> None:
    from marlin import _inspect

    n, k = 200, 392
    weight = make_weight(n, k, 32, dtype=dtype, device="cuda", zeros=True)
    x = torch.eye(k, dtype=dtype, device="cuda")
    expected = weight.dense64().T.float().to(dtype)
    try:
        for kernel in _inspect.plans():
            if kernel["sparse"]:
                continue
            if kernel["family"] != "sm80" and torch.cuda.get_device_capability() != (9, 0):
                continue
            few = kernel["family"] == "sm90_decode"
            for shares in kernel["shares"]:
                _inspect.force_plan(kernel["id"], shares=shares)
                for m in {min(kernel["tokens"], k), kernel["tokens"] if few else k}:
                    for first in range(0, k, m):
                        rows = slice(first, first + m)
                        assert torch.equal(weight.gemm(x[rows]), expected[rows]), kernel["name"]
    finally:
        _inspect.force_plan()


@pytest.mark.gpu
def test_more_than_2_to_the_31_outputs() -> None:
    m, n, k = 70000, 32768, 64
    weight = make_weight(n, k, device="cuda")
    x = make_input(m, k, dtype=torch.float16, device="cuda")
    y = weight.gemm(x)
    assert y.numel() > 2**31
    for rows in (slice(0, 16), slice(m - 16, m)):
        rounded = reference.rounds_weights(m, n, k)
        reference.assert_close(y[rows], x[rows], weight.dense64(), rounded=rounded)


@pytest.mark.gpu
def test_misaligned_scales_and_zeros() -> None:
    """Tensors that start between 16-byte boundaries, as views into larger ones may."""
    weight = make_weight(128, 256, 64, device="cuda", zeros=True)
    assert weight.zeros is not None
    x = make_input(5, 256, dtype=torch.float16, device="cuda")
    expected = weight.gemm(x)
    for name in ("scales", "zeros"):
        t = getattr(weight, name)
        view = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        tensors = {"scales": weight.scales, "zeros": weight.zeros, name: view}
        assert torch.equal(torch.ops.marlin.gemm(x, weight.qweight, **tensors), expected)


def test_equal_bits_every_time(device: str) -> None:
    for m, n, k in ((1, 1024, 4096), (16, 576, 7168), (33, 256, 2880), (130, 320, 1024)):
        weight = make_weight(n, k, device=device)
        x = make_input(m, k, dtype=torch.float16, device=device)
        first = weight.gemm(x)
        for _ in range(5):
            assert torch.equal(weight.gemm(x), first)


def test_leading_shapes(device: str) -> None:
    weight = make_weight(72, 128, device=device, bias=True)
    x = make_input(24, 128, dtype=torch.float16, device=device)
    y = weight.gemm(x)
    assert torch.equal(weight.gemm(x.view(2, 3, 4, 128)), y.view(2, 3, 4, 72))
    assert torch.equal(weight.gemm(x.view(24, 1, 1, 128)), y.view(24, 1, 1, 72))
    assert weight.gemm(x[0]).shape == (72,)
    reference.assert_close(weight.gemm(x[0])[None], x[:1], weight.dense64(), weight.bias)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 3, 128)], ids=str)
def test_no_tokens(device: str, shape: tuple[int, ...]) -> None:
    weight = make_weight(72, 128, device=device)
    y = weight.gemm(torch.empty(shape, dtype=torch.float16, device=device))
    assert y.shape == (*shape[:-1], 72)


def test_strided_rows(device: str) -> None:
    weight = make_weight(72, 200, device=device)
    dense = weight.dense64()
    wide = make_input(24, 456, dtype=torch.float16, device=device)
    views = {
        "aligned": wide[:, 8:208],
        "unaligned": wide[:, 3:203],
        "every other row": wide[::2, :200],
        "expanded": wide[:1, :200].expand(5, 200),
        "overlapping": wide.flatten().as_strided((6, 200), (8, 1)),
    }
    for name, x in views.items():
        assert torch.equal(weight.gemm(x), weight.gemm(x.contiguous())), name
        reference.assert_close(weight.gemm(x), x, dense)
    whole = make_weight(72, 256, device=device)  # a K that needs no padding
    for x in (wide[:1, :256].expand(5, 256), wide.flatten().as_strided((6, 256), (8, 1))):
        assert torch.equal(whole.gemm(x), whole.gemm(x.contiguous()))
    x = wide[:, :400].view(24, 2, 200).transpose(0, 1)  # rows without one common stride
    assert torch.equal(weight.gemm(x), weight.gemm(x.contiguous()))


def test_nothing_leaks_from_padding(device: str) -> None:
    """Infinities and NaNs next to a strided input must not reach the output."""
    weight = make_weight(72, 72, 32, device=device)
    wide = torch.full((4, 128), float("nan"), dtype=torch.float16, device=device)
    wide[:, :72] = make_input(4, 72, dtype=torch.float16, device=device)
    assert bool(weight.gemm(wide[:, :72]).isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_weight, make_weight_24], ids=["dense", "24"])
def test_few_tokens_do_not_meet_what_shared_memory_holds(make: Maker) -> None:
    """Hopper multiplies 8 tokens; for those that do not exist it reads what an earlier launch has
    left behind the others."""
    for n, k in ((512, 4096), (6144, 4096), (16384, 4096)):  # which take three kernels
        weight = make(n, k, device="cuda")
        dense = weight.dense64()
        poison = torch.full((8, k), float("nan"), dtype=torch.float16, device="cuda")
        for m in range(1, 8):
            x = make_input(m, k, dtype=torch.float16, device="cuda", seed=m)
            assert bool(weight.gemm(poison).isnan().all())
            reference.assert_close(weight.gemm(x), x, dense, sparse=make is make_weight_24)


def test_special_values_pass_through(device: str) -> None:
    weight = make_weight(64, 64, device=device)
    x = make_input(3, 64, dtype=torch.float16, device=device)
    x[1, 5] = float("inf")
    y = weight.gemm(x)
    assert bool(y[0].isfinite().all())
    assert bool(y[2].isfinite().all())
    assert not bool(y[1].isfinite().any())  # inf, or NaN where the weight is zero


def test_gradient_of_the_activation(device: str) -> None:
    weight = make_weight(72, 136, 32, device=device, zeros=True, perm=True, bias=True)
    x = make_input(5, 136, dtype=torch.float16, device=device).requires_grad_()
    upstream = make_input(5, 72, dtype=torch.float16, device=device, seed=2)
    weight.gemm(x).backward(upstream)
    assert x.grad is not None
    dense = weight.dense64().T.contiguous()
    # The weight is rounded to fp16 on the way, once: 2^-11 relative, so 2^-10 with the output's.
    expected = upstream.double() @ dense.T.to(device)
    scale = upstream.double().abs() @ dense.T.abs().to(device)
    assert bool(((x.grad.double() - expected).abs() <= 2**-10 * scale + 2**-24).all())
