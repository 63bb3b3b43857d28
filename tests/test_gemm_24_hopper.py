"""The Hopper kernels of gemm_24, one by one: with blocks that share tiles or not, on
all multiprocessors and on three, where blocks do many tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import reference
import torch
from operands import DTYPES, GROUP_SIZES, Weight24, make_input, make_weight, make_weight_24
from torch import Tensor

from marlin import _inspect

ops = torch.ops.marlin

FAMILIES = ("sm90_decode_24", "sm90_prefill_24")
KERNELS = [kernel for kernel in _inspect.plans() if kernel["family"] in FAMILIES]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.usefixtures("planner"),
]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=[k["name"] for k in KERNELS])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def partitions(kernel: dict[str, Any]) -> Iterator[None]:
    """Forces the kernel, with each partition of its work in turn."""
    for shares in kernel["shares"]:
        for sms in (0, 3, 5):
            _inspect.force_plan(kernel["id"], sms=sms, shares=shares)
            yield


@cache
def weight_of(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    options: bool = True,
    integers: bool = False,
) -> Weight24:
    return make_weight_24(
        n, k, group_size, dtype=dtype, device="cuda", zeros=options, bias=options,
        integers=integers,
    )  # fmt: skip


def integers(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return make_input(m, k, dtype=dtype, device="cuda", integers=True)


@every_kernel
@every_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
def test_against_fp64(
    kernel: dict[str, Any], dtype: torch.dtype, group_size: int, options: bool
) -> None:
    w = weight_of(712, 5000, group_size, dtype, options=options)
    dense = w.dense64()
    for m in (1, kernel["tokens"] // 2 + 1, kernel["tokens"]):
        x = make_input(m, 5000, dtype=dtype, device="cuda")
        for _ in partitions(kernel):
            y = w.gemm(x)
            rounded = reference.kernel_rounds(kernel, group_size)
            reference.assert_close(y, x, dense, w.bias, rounded=rounded)
            assert torch.equal(w.gemm(x), y), "other bits the second time"


@every_kernel
@every_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_one_hot_inputs_read_out_the_weight(
    kernel: dict[str, Any], dtype: torch.dtype, group_size: int
) -> None:
    """Every column of nine blocks and every row, so all places, steps and both selectors."""
    n, k = 200, 1100
    w = make_weight_24(n, k, group_size, dtype=dtype, device="cuda", zeros=True)
    x = torch.eye(k, dtype=dtype, device="cuda")
    expected = w.dense64().T.float().to(dtype)
    for _ in partitions(kernel):
        for first in range(0, k, kernel["tokens"]):
            tokens = slice(first, first + kernel["tokens"])
            y = w.gemm(x[tokens])
            wrong = (y != expected[tokens]).nonzero()
            assert not wrong.numel(), (
                f"column {first + int(wrong[0, 0])} of row {int(wrong[0, 1])}; {len(wrong)} wrong"
            )


# Tails of quads, of 64 columns, of blocks, of stages, of row tiles; odd N, whose scales are copied.
SHAPES = [
    (1, 4), (77, 4), (64, 64), (77, 100), (128, 128), (1000, 132), (77, 192), (129, 256), (77, 300),
    (1000, 700), (192, 1024), (77, 5000), (5001, 512),
]  # fmt: skip


@every_kernel
@every_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_sums_of_small_integers_are_exact(
    kernel: dict[str, Any], dtype: torch.dtype, group_size: int
) -> None:
    tokens = kernel["tokens"]
    for n, k in SHAPES:
        w = weight_of(n, k, group_size, dtype, integers=True)
        x = integers(tokens, k, dtype)
        expected = w.gemm64(x).to(dtype)
        for _ in partitions(kernel):
            for m in {1, max(tokens - 1, 1), tokens}:
                assert torch.equal(w.gemm(x[:m]), expected[:m]), (n, k, m)


@every_kernel
@every_dtype
def test_every_number_of_tokens(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    n, k = 136, 1356
    w = weight_of(n, k, 64, dtype, integers=True)
    x = integers(kernel["tokens"], k, dtype)
    expected = w.gemm64(x).to(dtype)
    for _ in partitions(kernel):
        for m in range(1, kernel["tokens"] + 1):
            assert torch.equal(w.gemm(x[:m]), expected[:m]), m


@every_dtype
@pytest.mark.parametrize("kernel", [pytest.param(k, id=k["name"]) for k in KERNELS if k["any_m"]])
def test_more_tokens_than_a_tile_holds(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    """In several tiles, of which the last begins early."""
    n, k = 456, 1356
    w = weight_of(n, k, 64, dtype, integers=True)
    x = integers(1000, k, dtype)
    expected = w.gemm64(x).to(dtype)
    for _ in partitions(kernel):
        for m in (129, 131, 135, 136, 192, 255, 256, 257, 511, 640, 1000):
            assert torch.equal(w.gemm(x[:m]), expected[:m]), m


@every_dtype
def test_the_planner_has_a_kernel_for_every_number_of_tokens(dtype: torch.dtype) -> None:
    for n, k in ((136, 456), (4096, 4096), (7808, 1024)):
        w = weight_of(n, k, 128, dtype, integers=True)
        x = integers(600, k, dtype)
        expected = w.gemm64(x).to(dtype)
        for m in range(1, 600):
            assert torch.equal(w.gemm(x[:m]), expected[:m]), m


@every_kernel
def test_same_bits_every_time(kernel: dict[str, Any]) -> None:
    w = weight_of(712, 5000, 128, torch.float16)
    x = make_input(kernel["tokens"], 5000, dtype=torch.float16, device="cuda")
    for _ in partitions(kernel):
        first = w.gemm(x)
        for _ in range(50):
            assert torch.equal(w.gemm(x), first)


@every_kernel
@every_dtype
@pytest.mark.parametrize("value", ["max", "inf", "nan"])
def test_activations_at_places_not_stored_do_not_matter(
    kernel: dict[str, Any], dtype: torch.dtype, value: str
) -> None:
    """Place 3 of every quad is nowhere stored; a tensor core does not even multiply it by zero."""
    n, k = 200, 700
    g = torch.Generator().manual_seed(5)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    rank = torch.rand(n, k // 4, 3, generator=g).argsort(-1)
    mask = torch.nn.functional.pad(rank < 2, (0, 1)).view(n, k)
    qweight, meta = (t.cuda() for t in reference.pack_24(q, mask))
    scales = torch.full((1, n), 0.5, dtype=dtype, device="cuda")
    x = make_input(kernel["tokens"], k, dtype=dtype, device="cuda")
    changed = x.clone()
    changed[:, 3::4] = torch.finfo(dtype).max if value == "max" else float(value)
    for _ in partitions(kernel):
        assert torch.equal(
            ops.gemm_24(changed, qweight, meta, scales), ops.gemm_24(x, qweight, meta, scales)
        )


@every_kernel
@every_dtype
def test_nothing_leaks_from_beside_the_input(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    """K that ends within 64 columns, whose rows are copied, or with an odd number of them."""
    for k in (4, 64, 100, 192, 320, 1088):
        w = weight_of(77, k, 32, dtype, integers=True)
        x = integers(kernel["tokens"], k, dtype)
        wide = torch.full((kernel["tokens"], 2048), float("nan"), dtype=dtype, device="cuda")
        wide[:, :k] = x
        for _ in partitions(kernel):
            assert torch.equal(w.gemm(wide[:, :k]), w.gemm64(x).to(dtype)), k


@every_kernel
@every_dtype
def test_what_lies_in_shared_memory_does_not_matter(
    kernel: dict[str, Any], dtype: torch.dtype
) -> None:
    """Where a stage is not full, its weights are whatever was there before."""
    bits = torch.int16
    dense = make_weight(8192, 2048, dtype=dtype, device="cuda")
    for pattern in (0, -1, 0x5555, 0x7C00, 0x7F80):
        before = torch.full((64, 2048), pattern, dtype=bits, device="cuda").view(dtype)
        for n, k in ((77, 4), (77, 100), (300, 132), (300, 700)):
            w = weight_of(n, k, 128, dtype, integers=True)
            x = integers(kernel["tokens"], k, dtype)
            for shares in kernel["shares"]:
                _inspect.force_plan()
                dense.gemm(before)
                _inspect.force_plan(kernel["id"], shares=shares)
                assert torch.equal(w.gemm(x), w.gemm64(x).to(dtype)), (pattern, n, k)


@every_kernel
@every_dtype
def test_static_weights_in_a_chain(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    """Each layer reads what the one before has written, by launches that overlap."""
    layers = [
        make_weight_24(704, 704, 64, dtype=dtype, device="cuda", zeros=True, seed=i)
        for i in range(6)
    ]
    x = make_input(kernel["tokens"], 704, dtype=dtype, device="cuda")

    def chain(static_weights: bool) -> Tensor:
        y = x
        for layer in layers * 2:
            y = layer.gemm(y, static_weights=static_weights)
        return y

    for _ in partitions(kernel):
        expected = chain(False)
        assert bool(expected.isfinite().all())
        assert torch.equal(chain(True), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(True)
        for _ in range(10):
            graph.replay()
        assert torch.equal(y, expected)
