"""Round-to-nearest: within half a step of every weight, exact zeros, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import assert_message, make_linear
from operands import DTYPES, GROUP_SIZES
from torch import Tensor, nn

from marlin import MarlinLinear
from marlin.quantize import quantize_rtn

SHAPES = [(64, 64), (72, 200), (200, 72), (1, 1), (3, 8), (65, 129), (128, 256), (130, 1001)]


def step_of(weight: Tensor, layer_scales: Tensor) -> Tensor:
    """The scale of each weight, fp64 [N, K]."""
    group = reference.group_of_column(weight.size(1), layer_scales.size(0))
    return layer_scales.cpu().double()[group].T


def assert_half_a_step(weight: Tensor, layer: MarlinLinear) -> None:
    """Every weight is within half a step of its code: 1e-6 is for the fp32 division by the step."""
    dense = reference.dequantize64(
        layer.qweight, layer.scales, layer.zeros, layer.perm, layer.in_features
    )
    error = (dense.cpu() - weight.cpu().double()).abs()
    bound = 0.5 * (1 + 1e-6) * step_of(weight, layer.scales)
    assert bool((error <= bound).all()), f"{(error / bound).max()} of half a step"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_linear_is_within_half_a_step(
    device: str, shape: tuple[int, int], group_size: int, symmetric: bool
) -> None:
    for source in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        linear = make_linear(*shape, dtype=source).to(device)
        layer = MarlinLinear.from_linear(linear, group_size=group_size, symmetric=symmetric)
        assert layer.scales.dtype == (source if source in DTYPES else torch.float16)
        assert layer.scales.device.type == device
        assert_half_a_step(linear.weight.detach(), layer)


@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-9, 1e-7, 1e-4, 1.0, 300.0, 3e4]),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_quantisation_of_any_weight(n, k, group_size, symmetric, dtype, magnitude, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(n, k, generator=generator) * 2 - 1 + shift) * (magnitude / 3)
    weight[torch.rand(n, k, generator=generator) < 0.1] = 0
    found = quantize_rtn(weight, group_size=group_size, symmetric=symmetric, dtype=dtype)
    assert int(found.q.max()) <= 15
    assert bool((found.scales > 0).all())
    assert (found.zeros is None) == symmetric
    step = step_of(weight, found.scales)
    zero = 8.0
    if found.zeros is not None:
        group = reference.group_of_column(k, found.scales.size(0))
        zero = found.zeros.double()[group].T
    error = ((found.q.double() - zero) * step - weight.double()).abs()
    assert bool((error <= 0.5 * (1 + 1e-6) * step).all())


def test_scale_is_the_smallest_that_serves() -> None:
    """The rule of the module's text, with exact numbers: 15 / 7.5 = 2, and 17 / 8.5 = 2."""
    weight = torch.tensor([[15.0, -3.0], [4.0, -17.0], [0.0, 0.0]])
    found = quantize_rtn(weight, group_size=-1)
    assert found.scales.tolist() == [[2.0, 2.0, 1.0]]
    assert found.q.tolist() == [[15, 6], [10, 0], [8, 8]]  # -1.5 rounds to even, 7.5 to 8 and back
    found = quantize_rtn(torch.tensor([[-5.0, 25.0]]), symmetric=False)
    assert found.zeros is not None
    assert (found.scales.item(), found.zeros.item(), found.q.tolist()) == (2.0, 2, [[0, 14]])


def test_mean_squared_error_against_the_common_rule() -> None:
    """At least 7% below max|w| / 7.5 on normal weights (9% in expectation)."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    found = quantize_rtn(weight)
    mine = ((found.q.float() - 8) * step_of(weight, found.scales).float() - weight).square().mean()
    groups = weight.view(512, -1, 128)
    step = groups.abs().amax(-1, keepdim=True) / 7.5
    common = ((groups / step).round().clamp(-8, 7) * step - groups).square().mean()
    assert mine < 0.93 * common


def test_zero_groups_are_exact() -> None:
    linear = make_linear(64, 256)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[:, 128:] = 0
    for symmetric in (True, False):
        dense = MarlinLinear.from_linear(linear, symmetric=symmetric).dequantize()
        assert not dense[3].any()
        assert not dense[:, 128:].any()
        assert torch.isfinite(dense).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_not_finite_weights_are_refused(bad: float, symmetric: bool) -> None:
    linear = make_linear(70, 200)
    with torch.no_grad():
        linear.weight[65, 130] = bad
    with pytest.raises(ValueError) as caught:
        MarlinLinear.from_linear(linear, symmetric=symmetric)
    assert_message(caught.value, "weight: got NaN or infinity", "output feature 65, group 1",
                   "must be finite", "leave this layer unquantised")  # fmt: skip


def test_weights_beyond_the_dtype_are_refused() -> None:
    linear = make_linear(64, 128)
    with torch.no_grad():
        linear.weight[5, 7] = 1e6
    with pytest.raises(ValueError) as caught:
        MarlinLinear.from_linear(linear)
    assert_message(caught.value, "weight: got magnitude 1e+06 in output feature 5, group 0",
                   "65504", "dtype=torch.bfloat16")  # fmt: skip
    layer = MarlinLinear.from_linear(linear, dtype=torch.bfloat16)
    assert torch.isfinite(layer.dequantize()).all()
    with torch.no_grad():
        linear.weight[5, 7] = 3.4e38
    with pytest.raises(ValueError, match="rescale the weight"):
        MarlinLinear.from_linear(linear, dtype=torch.bfloat16)


def test_large_half_weights_stay_finite() -> None:
    """Up to the refusal, no code of the layer is infinite in fp16."""
    for value in (-61000.0, 61000.0, 60000.0):
        linear = make_linear(1, 32)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[0, :2] = torch.tensor([value, -0.9 * value])
        layer = MarlinLinear.from_linear(linear)
        assert torch.isfinite(layer.dequantize()).all()


def test_bias_is_kept_and_checked() -> None:
    linear = make_linear(64, 64)
    layer = MarlinLinear.from_linear(linear)
    assert torch.equal(layer.bias, linear.bias.half())
    assert MarlinLinear.from_linear(make_linear(64, 64, bias=False)).bias is None
    with torch.no_grad():
        linear.bias[9] = 1e5
    with pytest.raises(ValueError, match=r"bias: got 100000\.0 at \[9\]; it must be finite"):
        MarlinLinear.from_linear(linear)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: MarlinLinear.from_linear(nn.Conv1d(1, 1, 1)), TypeError,
         ("linear: got Conv1d", "replace_linear")),
        (lambda: MarlinLinear.from_linear(nn.Linear(8, 8), group_size=16), ValueError,
         ("group_size: got 16", "32, 64, 128, or -1")),
        (lambda: MarlinLinear.from_linear(nn.Linear(8, 8), dtype=torch.float32), TypeError,
         ("dtype: got torch.float32", "torch.bfloat16")),
        (lambda: quantize_rtn(torch.zeros(8, 8, dtype=torch.int32)), TypeError,
         ("weight: got int32 [8, 8]", "float16")),
        (lambda: quantize_rtn(torch.zeros(8, 8).to(torch.float8_e4m3fn)), TypeError,
         ("weight: got float8_e4m3fn", "dequantise")),
        (lambda: quantize_rtn(torch.zeros(8)), ValueError, ("weight: got float32 [8]", "matrix")),
        (lambda: quantize_rtn(torch.zeros(0, 8), layer="a.b"), ValueError, ("a.b: weight: got",)),
        (lambda: MarlinLinear(0, 8), ValueError, ("in_features: got 0", "at least 1")),
        (lambda: MarlinLinear(64, 8.0), TypeError, ("out_features: got 8.0", "must be an int")),
        (lambda: MarlinLinear(8, -1), ValueError, ("out_features: got -1",)),
        (lambda: MarlinLinear(8, 8, group_size=100), ValueError, ("group_size: got 100",)),
        (lambda: MarlinLinear(8, 8, dtype=torch.float64), TypeError, ("dtype: got torch.float64",)),
    ],
)  # fmt: skip
def test_refused_arguments(
    call: Callable[[], object], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert_message(caught.value, *parts)
