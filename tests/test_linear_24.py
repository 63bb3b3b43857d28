"""MarlinLinear24: what it computes, what it says of itself, and the weights it is made from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from checkpoints import GptqLayer, gptq_tensors
from checkpoints import make_layer as make_gptq
from layers import (
    assert_message,
    assert_same,
    layer_and_weight_24,
    make_layer,
    make_layer_24,
    make_linear,
    pruned_weight,
)
from operands import DTYPES, GROUP_SIZES, make_input
from test_formats_compressed_tensors import pack_rows, to
from torch import Tensor, nn

from marlin import MarlinLinear, MarlinLinear24
from marlin.formats.sparse import places_problem
from marlin.prune import largest_two

ALL = {"zeros": True, "bias": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ALL], ids=str)
def test_forward_and_dequantize(device: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    for shape in ((72, 200), (64, 128), (1, 4), (130, 332)):
        layer, dense = layer_and_weight_24(*shape, dtype=dtype, device=device, **options)
        assert torch.equal(layer.dequantize().cpu(), dense.to(dtype))
        x = make_input(6, shape[1], dtype=dtype, device=device)
        reference.assert_close(layer(x), x, dense, layer.bias, rounded=False)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 1, 2)], ids=str)
def test_leading_shapes(device: str, shape: tuple[int, ...]) -> None:
    layer = make_layer_24(bias=True, device=device)
    x = torch.randn(*shape, 200, device=device).half()
    y = layer(x)
    assert y.shape == (*shape, 72)
    assert torch.equal(y.view(-1, 72), layer(x.view(-1, 200)))


def test_transposed_input(device: str) -> None:
    layer = make_layer_24(device=device)
    x = torch.randn(200, 5, device=device).half()
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


def test_input_of_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"input|scales"):
        make_layer_24()(torch.randn(2, 200))


def test_autocast_casts_the_input(device: str) -> None:
    layer = make_layer_24(dtype=torch.bfloat16, device=device)
    x = torch.randn(2, 200, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_gradient_of_the_input(device: str) -> None:
    layer = make_layer_24(**ALL, device=device)
    assert not list(layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    x = make_input(4, 200, dtype=torch.float16, device=device).requires_grad_()
    upstream = make_input(4, 72, dtype=torch.float16, device=device, seed=5)
    layer(x).backward(upstream)
    assert x.grad is not None
    reference.assert_close(x.grad, upstream, layer.dequantize().double().T, rounded=False)


@pytest.mark.parametrize("features", [196, 199, 204, 256])
def test_another_number_of_features_is_refused(device: str, features: int) -> None:
    """The op pads K to 256 here, and could not tell."""
    with pytest.raises(RuntimeError) as caught:
        make_layer_24(device=device)(torch.randn(2, features, device=device).half())
    assert_message(caught.value, f"input: got {features} features", "in_features=200", "[..., 200]")


def test_compile() -> None:
    layer = make_layer_24(bias=True)
    x = make_input(3, 200, dtype=torch.float16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_export(zeros: bool, bias: bool) -> None:
    """A buffer named ``meta`` could not be."""
    layer = make_layer_24(zeros=zeros, bias=bias)
    x = make_input(3, 200, dtype=torch.float16)
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    for one in (layer, nn.Sequential(layer)):
        exported = torch.export.export(one, (x,), dynamic_shapes=(rows,))
        assert torch.equal(exported.module()(x), one(x))


def test_new_layer_is_zero() -> None:
    for options in ({}, {"zeros": True}, {"bias": False}):
        layer = MarlinLinear24(200, 72, **options)
        assert not layer(torch.randn(2, 200).half()).any()
    meta = MarlinLinear24(200, 72, device="meta")
    assert meta(torch.empty(3, 200, dtype=torch.float16, device="meta")).shape == (3, 72)
    assert meta.dequantize().shape == (72, 200)


def test_weight_attribute_is_explained() -> None:
    layer = make_layer_24()
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"MarlinLinear24 has no 'weight'.*dequantize\(\)"):
        _ = layer.weight
    assert not hasattr(layer, "perm")


def test_representation() -> None:
    layer = MarlinLinear24(4096, 4096, device="meta")
    assert repr(layer) == (
        "MarlinLinear24(in_features=4096, out_features=4096, group_size=128, symmetric, "
        "2:4 sparse, bias=True, 3.125 bits/weight)"
    )
    layer = MarlinLinear24(4096, 4096, zeros=True, group_size=-1, device="meta")
    assert layer.bits_per_weight == 3 + (16 + 8) / 4096
    assert "group_size=-1, asymmetric, 2:4 sparse" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((0, 72), ValueError, ("in_features: got 0", "at least 1")),
        ((30, 72), ValueError, ("in_features: got 30", "multiple of 4", "dense")),
        ((200, -1), ValueError, ("out_features: got -1",)),
    ],
)
def test_constructor_refuses(
    arguments: tuple[int, int], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        MarlinLinear24(*arguments)
    assert_message(caught.value, *parts)
    with pytest.raises(TypeError, match=r"dtype: got torch\.float32"):
        MarlinLinear24(200, 72, dtype=torch.float32)
    with pytest.raises(ValueError, match="group_size: got 48"):
        MarlinLinear24(200, 72, group_size=48)


def packed(**changes: Tensor | None) -> MarlinLinear24:
    layer = make_layer_24(**ALL)
    tensors = {name: getattr(layer, name) for name in layer._buffers}
    return MarlinLinear24.from_packed(**{**tensors, **changes}, in_features=200, out_features=72)


def test_from_packed_shares_its_tensors() -> None:
    one = make_layer_24(**ALL)
    other = MarlinLinear24.from_packed(
        **dict(one.named_buffers()), in_features=200, out_features=72
    )
    assert all(t.data_ptr() == getattr(one, name).data_ptr() for name, t in other.named_buffers())
    assert_same(one, other)


def falling() -> Tensor:
    places = make_layer_24().places.clone()
    places[1, 0, 7] = places[1, 0, 7] & ~0xF0 | 0b0110_0000  # 2 before 1
    return places


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"qweight": None}, TypeError, ("qweight: got None", "from_packed")),
        ({"places": None}, TypeError, ("places: got None",)),
        ({"qweight": torch.zeros(2, 4, 512, dtype=torch.int32)}, ValueError,
         ("qweight: got int32 [2, 4, 512]", "need int32 [2, 2, 512]")),
        ({"places": torch.zeros(2, 2, 512, dtype=torch.int32)}, ValueError,
         ("places: got int32 [2, 2, 512]", "need int32 [2, 2, 256]")),
        ({"places": torch.zeros(2, 2, 256, dtype=torch.int16)}, TypeError,
         ("places: got int16", "cast it with .to(torch.int32)")),
        ({"places": torch.zeros(2, 2, 256, dtype=torch.int32)}, ValueError,
         ("places: got 0x00000000 at [0, 0, 0]", "must rise", "pack_24")),
        ({"places": falling()}, ValueError, ("places: got 0x", "at [1, 0, 7]")),
        ({"places": torch.zeros(2, 2, 256, dtype=torch.int32, device="meta")}, ValueError,
         ("places: got a tensor on meta", "one device")),
        ({"places": torch.zeros(2, 256, 2, dtype=torch.int32).transpose(1, 2)}, ValueError,
         ("places: got strides", "contiguous")),
        ({"scales": torch.zeros(4, 72)}, TypeError, ("scales: got float32 [4, 72]",)),
        ({"scales": torch.zeros(5, 72).half()}, ValueError, ("scales: got 5 groups",)),
        ({"zeros": torch.full((4, 72), 16, dtype=torch.uint8)}, ValueError, ("zeros: got 16",)),
        ({"bias": torch.zeros(73, dtype=torch.float16)}, ValueError, ("bias: got float16 [73]",)),
    ],
)  # fmt: skip
def test_from_packed_refuses(
    changes: dict[str, Tensor | None], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        packed(**changes)
    assert_message(caught.value, *parts)


def test_from_packed_refuses_other_feature_counts() -> None:
    tensors = dict(make_layer_24().named_buffers())
    with pytest.raises(ValueError, match=r"in_features: got 198.*multiple of 4"):
        MarlinLinear24.from_packed(**tensors, in_features=198, out_features=72)


def test_which_places_rise() -> None:
    """Every nibble at every position of a word, among nibbles that are right."""
    for nibble in range(16):
        first, second = nibble & 3, nibble >> 2
        for position in range(8):
            word = 0x44444444 & ~(15 << 4 * position) | nibble << 4 * position
            places = torch.full((1, 2, 256), 0x44444444, dtype=torch.int32)
            places[0, 1, 200] = word - 2**32 if word >= 2**31 else word
            found = places_problem(places)
            assert bool(found) == (first >= second), (nibble, position)
            if found:
                assert_message(ValueError(found), f"got {word:#010x} at [0, 1, 200]")


def by_hand(weight: Tensor) -> Tensor:
    """The two largest of every four, one quad at a time."""
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(weight.size(0)):
        for first in range(0, weight.size(1), 4):
            quad = [abs(float(w)) for w in weight[row, first : first + 4]]
            for place in sorted(range(4), key=lambda i: -quad[i])[:2]:
                kept[row, first + place] = True
    return kept


def test_largest_two_of_four(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (33, 44), generator=g).float()  # many equal ones
    assert torch.equal(largest_two(weight.to(device)).cpu(), by_hand(weight))
    weight = torch.randn(33, 44, generator=g).half()
    assert torch.equal(largest_two(weight.to(device)).cpu(), by_hand(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_from_linear(device: str, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    """As a dense layer of the pruned weight is rounded, and zero where it was pruned."""
    linear = make_linear(72, 200).to(device, dtype)
    before = copy.deepcopy(linear)
    layer = MarlinLinear24.from_linear(
        linear, prune="magnitude", group_size=group_size, symmetric=symmetric
    )
    pruned = copy.deepcopy(linear)
    pruned.weight.data *= largest_two(linear.weight)
    dense = MarlinLinear.from_linear(pruned, group_size=group_size, symmetric=symmetric)
    assert torch.equal(layer.dequantize(), dense.dequantize())
    assert torch.equal(layer.scales, dense.scales)
    assert torch.equal(layer.bias, dense.bias)
    assert (layer.zeros is None) == symmetric
    assert layer.training == linear.training
    assert torch.equal(linear.weight, before.weight)
    assert_same(
        MarlinLinear24.from_pruned(pruned, group_size=group_size, symmetric=symmetric), layer
    )


def test_from_linear_keeps_mode_and_meta() -> None:
    assert not MarlinLinear24.from_linear(nn.Linear(8, 8).eval(), prune="magnitude").training
    for made in (
        MarlinLinear24.from_linear(nn.Linear(200, 72, device="meta"), prune="magnitude"),
        MarlinLinear24.from_pruned(nn.Linear(200, 72, device="meta"), symmetric=False),
    ):
        assert made.qweight.is_meta
        assert made.places.shape == (2, 2, 256)


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: MarlinLinear24.from_linear(nn.Linear(8, 8)), TypeError, ("prune",)),
        (lambda: MarlinLinear24.from_linear(nn.Linear(8, 8), prune="wanda"), ValueError,
         ("prune: got 'wanda'", "'magnitude'")),
        (lambda: MarlinLinear24.from_linear(nn.Linear(8, 8), prune=None), ValueError,
         ("prune: got None", "from_pruned")),
        (lambda: MarlinLinear24.from_linear(nn.Linear(6, 8), prune="magnitude"), ValueError,
         ("in_features: got 6", "multiple of 4")),
        (lambda: MarlinLinear24.from_linear(nn.ReLU(), prune="magnitude"), TypeError,
         ("linear: got ReLU", "replace_linear(model, sparse=True")),
        (lambda: MarlinLinear24.from_pruned(nn.ReLU(), layer="v"), TypeError,
         ("v: source: got ReLU",)),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 8).int(), layer="v"), TypeError,
         ("v: weight: got int32 [8, 8]", "dequantise the weight first")),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 8).to(torch.float8_e4m3fn)), TypeError,
         ("weight: got float8_e4m3fn [8, 8]",)),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8)), ValueError,
         ("weight: got float32 [8]", "matrix")),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(0, 8)), ValueError,
         ("weight: got float32 [0, 8]",)),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 6), layer="v"), ValueError,
         ("v: in_features: got 6",)),
        (lambda: MarlinLinear24.from_pruned(nn.Linear(8, 8), torch.zeros(8)), TypeError,
         ("bias: got a tensor beside an nn.Linear",)),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 8), torch.zeros(7)), ValueError,
         ("bias: got float32 [7]", "float [8]")),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 8), dtype=torch.float64), TypeError,
         ("dtype: got torch.float64",)),
        (lambda: MarlinLinear24.from_pruned(torch.zeros(8, 8), group_size=16), ValueError,
         ("group_size: got 16",)),
        (lambda: MarlinLinear24.from_pruned(torch.full((8, 1), float("nan")) * torch.eye(8)[0],
                                            layer="v"), ValueError, ("v: weight: got 4 weights",)),
        (lambda: MarlinLinear24.from_linear(with_nan(), prune="magnitude"), ValueError,
         ("weight: got NaN or infinity in output feature 3",)),
    ],
)  # fmt: skip
def test_float_weights_refused(make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert_message(caught.value, *parts)


def with_nan() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight.data[3, :4] = float("nan")
    return linear


def test_from_pruned_names_the_first_offending_quad() -> None:
    weight = pruned_weight(72, 200)
    weight[41, 100:104] = torch.tensor([1.0, 0, 2, 3])
    weight[50, 0:4] = 1
    with pytest.raises(ValueError) as caught:
        MarlinLinear24.from_pruned(weight, layer="model.q_proj")
    assert_message(
        caught.value, "model.q_proj: weight: got 3 weights other than zero in row 41, columns "
        "100..103", "the first of 2 such quads of 3600", "2 of every 4", "prune='magnitude'",
    )  # fmt: skip
    weight[41, 100:104] = weight[50, 0:4] = -0.0
    bias = torch.randn(72)
    layer = MarlinLinear24.from_pruned(weight, bias, dtype=torch.bfloat16)
    assert torch.equal(layer.bias, bias.bfloat16())
    assert not layer.dequantize()[weight == 0].any()


def test_from_pruned_of_a_strided_weight() -> None:
    weight = pruned_weight(72, 200)
    strided = weight.T.contiguous().T
    assert_same(MarlinLinear24.from_pruned(strided), MarlinLinear24.from_pruned(weight))


def codes_24(n: int, k: int, zero: Tensor | int, seed: int = 3) -> Tensor:
    """Codes uint8 [N, K], a 2:4 pattern of which differs from ``zero``, broadcast."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.rand(n, k // 4, 4, generator=g).argsort(-1).argsort(-1).view(n, k)
    q = torch.randint(0, 16, (n, k), generator=g)
    return torch.where(rank < 2, q, zero).to(torch.uint8)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [False, True])
def test_from_gptq(device: str, group_size: int, zeros: bool) -> None:
    n, k = 72, 200
    groups = 1 if group_size == -1 else -(-k // group_size)
    g_idx = torch.arange(k) // (k if group_size == -1 else group_size)
    points = torch.randint(1, 16, (groups, n)) if zeros else torch.full((groups, n), 8)
    q = codes_24(n, k, points[g_idx].T)
    scales = (torch.rand(groups, n) * 0.02 + 0.001).half()
    source = GptqLayer(q, points.to(torch.uint8), scales, g_idx.int(), group_size,
                       torch.randn(n).half())  # fmt: skip
    tensors = {name: t.to(device) for name, t in gptq_tensors(source).items()}
    layer = MarlinLinear24.from_gptq(**tensors)
    assert torch.equal(layer.dequantize().cpu().double(), source.weight().half().double())
    assert layer.group_size == group_size
    assert layer.bias is not None
    dense = MarlinLinear.from_gptq(**tensors)
    assert torch.equal(layer.dequantize(), dense.dequantize())
    assert layer.bits_per_weight < dense.bits_per_weight
    x = make_input(5, k, dtype=torch.float16, device=device)
    reference.assert_close(layer(x), x, source.weight(), layer.bias, rounded=False)


def test_from_gptq_refuses_what_is_not_sparse() -> None:
    dense = make_gptq(64, 64)
    dense.q[:] = 8
    dense.q[17, 20:24] = 3
    with pytest.raises(ValueError) as caught:
        MarlinLinear24.from_gptq(**gptq_tensors(dense), layer="q_proj")
    assert_message(
        caught.value, "q_proj: weight: got 4 weights other than zero in row 17, columns 20..23",
        "prune the model to 2:4", "keep this layer dense, as MarlinLinear",
    )  # fmt: skip
    ordered = make_gptq(64, 64, act_order=True)
    ordered.q[:] = 8
    with pytest.raises(ValueError, match=r"q_proj: g_idx: got act-order; .*desc_act=False"):
        MarlinLinear24.from_gptq(**gptq_tensors(ordered), layer="q_proj")


def test_from_awq() -> None:
    n, k = 72, 200
    q = codes_24(n, k, 8)
    scales = (torch.rand(4, n) * 0.02).half()
    layer = MarlinLinear24.from_awq(reference.awq_pack(q), None, scales, torch.ones(n).half())
    want = (q.double() - 8) * scales.double().repeat_interleave(64, 0)[:k].T
    assert torch.equal(layer.dequantize(), want.half())
    q[5, 8:12] = 1
    with pytest.raises(ValueError, match=r"v: weight: got 4 .* in row 5, columns 8\.\.11"):
        MarlinLinear24.from_awq(reference.awq_pack(q), None, scales, layer="v")


@pytest.mark.parametrize("zeros", [False, True])
def test_from_compressed_tensors(device: str, zeros: bool) -> None:
    n, k = 72, 204
    points = torch.randint(0, 16, (n, 4)) if zeros else torch.full((n, 4), 8)
    spread = points.repeat_interleave(64, 1)[:, :k]
    q = codes_24(n, k, spread)
    scale = (torch.rand(n, 4) * 0.02).bfloat16()
    tensors = {
        "weight_packed": pack_rows(q),
        "weight_scale": scale,
        "weight_shape": (n, k),
        "weight_zero_point": pack_rows(points.T).T if zeros else None,
    }
    layer = MarlinLinear24.from_compressed_tensors(**to(device, tensors))
    want = (q.double() - spread) * scale.double().repeat_interleave(64, 1)[:, :k]
    assert torch.equal(layer.dequantize().cpu(), want.bfloat16())
    order = (torch.arange(k) // 64)[torch.randperm(k)].int()
    with pytest.raises(ValueError, match=r"v: g_idx: got act-order.*actorder=None"):
        MarlinLinear24.from_compressed_tensors(**tensors, weight_g_idx=order, layer="v")


def test_the_two_kinds_of_layer_are_apart() -> None:
    assert not isinstance(make_layer_24(), MarlinLinear)
    assert not isinstance(make_layer(), MarlinLinear24)
