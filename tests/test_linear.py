"""MarlinLinear: what it computes, what it says of itself, and the tensors it is made from."""

from __future__ import annotations

import pytest
import reference
import torch
from layers import assert_message, assert_same, make_layer
from operands import DTYPES, make_input, make_weight
from torch import Tensor, nn
from torch.autograd import forward_ad

from marlin import MarlinLinear, MarlinLinear24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"zeros": True, "bias": True}, {"perm": True}], ids=str)
def test_forward_and_dequantize(device: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    layer = make_layer(dtype=dtype, device=device, **options)
    dense = reference.dequantize64(layer.qweight, layer.scales, layer.zeros, layer.perm, 200)
    # (q - z) * s is rounded once: half a unit in the last place of the result.
    torch.testing.assert_close(layer.dequantize(), dense.to(dtype), rtol=0, atol=0)
    x = make_input(6, 200, dtype=dtype, device=device)
    reference.assert_close(layer(x), x, dense, layer.bias)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 1, 2)], ids=str)
def test_leading_shapes(device: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(bias=True, device=device)
    x = torch.randn(*shape, 200, device=device).half()
    y = layer(x)
    assert y.shape == (*shape, 72)
    assert torch.equal(y.view(-1, 72), layer(x.view(-1, 200)))


def test_transposed_input(device: str) -> None:
    layer = make_layer(device=device)
    x = torch.randn(200, 5, device=device).half()
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


def test_input_of_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"input|scales"):
        make_layer()(torch.randn(2, 200))


def test_autocast_casts_the_input(device: str) -> None:
    layer = make_layer(dtype=torch.bfloat16, device=device)
    x = torch.randn(2, 200, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_gradient_of_the_input(device: str) -> None:
    layer = make_layer(zeros=True, perm=True, bias=True, device=device)
    assert not list(layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    x = make_input(4, 200, dtype=torch.float16, device=device).requires_grad_()
    upstream = make_input(4, 72, dtype=torch.float16, device=device, seed=5)
    layer(x).backward(upstream)
    assert x.grad is not None
    reference.assert_close(x.grad, upstream, layer.dequantize().double().T)


@pytest.mark.parametrize("sparse", [False, True])
def test_forward_mode_derivatives(device: str, sparse: bool) -> None:
    linear = nn.Linear(96, 40, dtype=torch.float16)
    layer: nn.Module = MarlinLinear.from_linear(linear)
    if sparse:
        layer = MarlinLinear24.from_linear(linear, prune="magnitude")
    layer.to(device)
    weight = layer.dequantize()
    x, t = (torch.randn(3, 96, device=device).half() for _ in range(2))
    want = (t.double() @ weight.double().T).half()
    y, moved = torch.func.jvp(layer, (x,), (t,))
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(moved, want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), weight, rtol=2e-3, atol=2e-3)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(layer(x)).tangent is None
        dual = layer(forward_ad.make_dual(x.clone().requires_grad_(), t))
        moved = forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(moved, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("features", [193, 199, 201, 256])
def test_another_number_of_features_is_refused(device: str, features: int) -> None:
    """The op pads K to 256 here, and could not tell."""
    with pytest.raises(RuntimeError) as caught:
        make_layer(device=device)(torch.randn(2, features, device=device).half())
    assert_message(caught.value, f"input: got {features} features", "in_features=200", "[..., 200]")


def test_compile() -> None:
    layer = make_layer(bias=True, perm=True)
    x = make_input(3, 200, dtype=torch.float16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_export(zeros: bool, perm: bool, bias: bool) -> None:
    layer = make_layer(zeros=zeros, perm=perm, bias=bias)
    x = make_input(3, 200, dtype=torch.float16)
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    for one in (layer, nn.Sequential(layer)):
        exported = torch.export.export(one, (x,), dynamic_shapes=(rows,))
        assert torch.equal(exported.module()(x), one(x))


def test_new_layer_is_zero() -> None:
    for options in ({}, {"zeros": True}, {"perm": True}, {"bias": False}):
        layer = MarlinLinear(200, 72, **options)
        assert not layer(torch.randn(2, 200).half()).any()


def test_weight_attribute_is_explained() -> None:
    layer = make_layer()
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"layer\.dequantize\(\).*layer\.scales\.dtype"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


def test_representation() -> None:
    layer = MarlinLinear(4096, 4096, device="meta")
    assert repr(layer) == (
        "MarlinLinear(in_features=4096, out_features=4096, group_size=128, symmetric, "
        "act_order=False, bias=True, 4.125 bits/weight)"
    )
    layer = MarlinLinear(4096, 4096, zeros=True, perm=True, group_size=-1, device="meta")
    assert layer.bits_per_weight == 4 + (16 + 8) / 4096 + 32 / 4096
    assert "group_size=-1, asymmetric, act_order=True" in repr(layer)
    assert MarlinLinear(100, 64, group_size=128).group_size == -1  # one group is one group


def packed(**changes: Tensor | None) -> MarlinLinear:
    weight = make_weight(72, 200, 64, zeros=True, perm=True, bias=True)
    tensors = {
        name: getattr(weight, name) for name in ("qweight", "scales", "zeros", "perm", "bias")
    }
    return MarlinLinear.from_packed(**{**tensors, **changes}, in_features=200, out_features=72)


def test_from_packed_shares_its_tensors() -> None:
    weight = make_weight(72, 200, 64)
    layer = MarlinLinear.from_packed(
        weight.qweight, weight.scales, in_features=200, out_features=72
    )
    assert layer.qweight.data_ptr() == weight.qweight.data_ptr()
    assert (layer.group_size, layer.in_features, layer.out_features) == (64, 200, 72)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"qweight": None}, TypeError, ("qweight: got None",)),
        ({"qweight": torch.zeros(2, 4, 512)}, TypeError,
         ("qweight: got float32 [2, 4, 512]", "int32 [2, 4, 512]", ".to(torch.int32)")),
        ({"qweight": torch.zeros(2, 3, 512, dtype=torch.int32)}, ValueError,
         ("qweight: got int32 [2, 3, 512]", "int32 [2, 4, 512]", "feature counts")),
        ({"scales": torch.zeros(4, 72)}, TypeError, ("scales: got float32", "scales.to(")),
        ({"scales": torch.zeros(72, dtype=torch.float16)}, ValueError, ("[groups, 72]",)),
        ({"scales": torch.zeros(4, 71, dtype=torch.float16)}, ValueError,
         ("scales: got float16 [4, 71]", "[4, 72]")),
        ({"scales": torch.zeros(5, 72, dtype=torch.float16)}, ValueError,
         ("scales: got 5 groups for in_features=200", "32, 64, 128")),
        ({"scales": torch.zeros(0, 72, dtype=torch.float16)}, ValueError, ("got 0 groups",)),
        ({"scales": torch.zeros(72, 4, dtype=torch.float16).T}, ValueError,
         ("scales: got strides", "scales.contiguous()")),
        ({"scales": torch.zeros(4, 72, dtype=torch.float16, device="meta")}, ValueError,
         ("scales: got a tensor on meta", "qweight is on cpu", "scales.to('cpu')")),
        ({"zeros": torch.zeros(4, 72, dtype=torch.int8)}, TypeError, ("zeros: got int8", "uint8")),
        ({"zeros": torch.zeros(4, 9, dtype=torch.uint8)}, ValueError, ("zeros: got uint8 [4, 9]",)),
        ({"zeros": torch.full((4, 72), 16, dtype=torch.uint8)}, ValueError,
         ("zeros: got 16", "0..15", "unpack")),
        ({"perm": torch.arange(200)}, TypeError, ("perm: got int64 [200]", "int32 [200]")),
        ({"perm": torch.arange(1, 201).int()}, ValueError, ("perm: got values 1..200", "0..199")),
        ({"perm": torch.zeros(200, dtype=torch.int32)}, ValueError, ("perm: got values 0..0",)),
        ({"bias": torch.zeros(72)}, TypeError, ("bias: got float32 [72]", "float16 [72]")),
        ({"bias": torch.zeros(73, dtype=torch.float16)}, ValueError, ("bias: got float16 [73]",)),
    ],
)  # fmt: skip
def test_from_packed_refuses(
    changes: dict[str, Tensor | None], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        packed(**changes)
    assert_message(caught.value, *parts)


def gptq_tensors(
    n: int, k: int, group_size: int, *, act_order: bool, zeros: bool, version: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a GPTQ layer, and its weight in fp64 [N, K]."""
    g = torch.Generator().manual_seed(n + k)
    groups = 1 if group_size == -1 else -(-k // group_size)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    scales = (torch.rand(groups, n, generator=g) * 0.02 + 0.001).half()
    z = torch.randint(1, 16, (groups, n), generator=g) if zeros else torch.full((groups, n), 8)
    g_idx = torch.arange(k) // (k if group_size == -1 else group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=g)]
    stored = z - int(version == 1)
    qzeros = (stored.view(groups, -1, 8) << (4 * torch.arange(8))).sum(-1)
    qzeros = torch.where(qzeros >= 2**31, qzeros - 2**32, qzeros).int()
    weight = (q.double() - z.double()[g_idx].T) * scales.double()[g_idx].T
    tensors = {
        "qweight": reference.gptq_pack(q),
        "qzeros": qzeros,
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return tensors, weight


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_from_gptq(
    device: str, group_size: int, act_order: bool, zeros: bool, checkpoint_format: str
) -> None:
    version = 2 if checkpoint_format == "gptq_v2" else 1
    tensors, weight = gptq_tensors(
        72, 200, group_size, act_order=act_order, zeros=zeros, version=version
    )
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    bias = torch.randn(72).half().to(device)
    layer = MarlinLinear.from_gptq(**tensors, bias=bias, checkpoint_format=checkpoint_format)
    assert torch.equal(layer.dequantize().cpu(), weight.half())
    assert (layer.perm is not None) == (act_order and group_size != -1)
    assert (layer.zeros is not None) == zeros
    assert layer.qweight.device.type == device
    assert torch.equal(layer.bias, bias)
    if not act_order:
        del tensors["g_idx"]
        again = MarlinLinear.from_gptq(**tensors, bias=bias, checkpoint_format=checkpoint_format)
        assert_same(again, layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_gptq_in_another_dtype(dtype: torch.dtype) -> None:
    tensors, _ = gptq_tensors(72, 200, 128, act_order=False, zeros=True, version=1)
    tensors["scales"] = tensors["scales"].to(dtype).float()
    bias = torch.full((72,), 0.1)
    with pytest.raises(ValueError, match=r"scales: got float32.*pass dtype=torch\.float16 or"):
        MarlinLinear.from_gptq(**tensors, bias=bias)
    layer = MarlinLinear.from_gptq(**tensors, bias=bias, dtype=dtype)
    assert torch.equal(layer.scales, tensors["scales"].to(dtype))
    assert torch.equal(layer.bias, bias.to(dtype))
    tensors["scales"] = tensors["scales"].to(dtype)
    with pytest.raises(ValueError, match=rf"bias: got 0\.1.*pass dtype={dtype} to round the bias"):
        MarlinLinear.from_gptq(**tensors, bias=bias)
    assert_same(MarlinLinear.from_gptq(**tensors, bias=bias, dtype=dtype), layer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qweight": torch.tensor(3, dtype=torch.int32)}, r"v: qweight: got int32 \[\].*8, out_"),
        ({"scales": torch.tensor(1.0)}, r"v: scales: got float32 \[\].*\[groups, out_features\]"),
        ({"qzeros": torch.tensor(3, dtype=torch.int32)}, r"v: qzeros has shape \[\]"),
        ({"g_idx": torch.empty(200, device="meta")}, r"v: g_idx: got a meta tensor.*load it"),
        ({"qweight": torch.empty(25, 72, device="meta")}, r"v: qweight: got a meta tensor"),
    ],
)
def test_from_gptq_refuses_what_is_not_a_matrix(change: dict[str, Tensor], reason: str) -> None:
    tensors, _ = gptq_tensors(72, 200, 128, act_order=False, zeros=True, version=1)
    with pytest.raises(ValueError, match=reason):
        MarlinLinear.from_gptq(**{**tensors, **change}, layer="v")


def test_from_gptq_refuses() -> None:
    tensors, _ = gptq_tensors(72, 200, 128, act_order=False, zeros=True, version=1)
    with pytest.raises(ValueError, match=r"q_proj: checkpoint_format: got 'marlin'.*'gptq_v2'"):
        MarlinLinear.from_gptq(**tensors, checkpoint_format="marlin", layer="q_proj")
    with pytest.raises(ValueError, match=r"q_proj: the config says sym"):
        MarlinLinear.from_gptq(**tensors, sym=True, layer="q_proj")
    five = {"scales": torch.zeros(5, 72).half(), "g_idx": torch.arange(200).int() // 40}
    with pytest.raises(ValueError, match=r"v: scales: got 5 groups for in_features=200"):
        MarlinLinear.from_gptq(**{**tensors, **five}, layer="v")
