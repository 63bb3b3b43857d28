"""AWQ "gemm" tensors and settings: exact conversion, and a reason for each refusal."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlin import CheckpointError, MarlinLinear
from marlin.formats.awq import pack_awq, parse_awq_config, unpack_zeros


def awq_tensors(
    n: int, k: int, group_size: int, *, zeros: bool = True, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of an AWQ layer, and its weight in fp64 [N, K]."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    z = torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=g)
    if not zeros:
        z.fill_(8)
    scales = (torch.rand(groups, n, generator=g) * 0.02 + 0.001).half()
    group = reference.group_of_column(k, groups)
    weight = (q.double() - z.double()[group].T) * scales.double()[group].T
    # qzeros pack the outputs of a group as qweight packs those of a feature.
    tensors = {
        "qweight": reference.awq_pack(q),
        "qzeros": reference.awq_pack(z.T),
        "scales": scales,
    }
    return tensors, weight


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("shape", [(8, 1), (72, 200), (128, 256), (256, 129)], ids=str)
def test_conversion_is_exact(
    device: str, shape: tuple[int, int], group_size: int, zeros: bool
) -> None:
    tensors, weight = awq_tensors(*shape, group_size, zeros=zeros)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    bias = torch.randn(shape[0]).half().to(device)
    layer = MarlinLinear.from_awq(**tensors, bias=bias)
    assert (layer.out_features, layer.in_features) == shape
    assert layer.qweight.device.type == device
    assert torch.equal(layer.dequantize().cpu(), weight.half())
    assert torch.equal(layer.bias, bias)
    assert (layer.zeros is None) == (not zeros)
    x = torch.randn(3, shape[1]).half().to(device)
    reference.assert_close(layer(x), x, weight, bias)


@given(groups=st.integers(1, 5), words=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_unpack_zeros_inverts_packing(groups: int, words: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 16, (groups, 8 * words), dtype=torch.uint8, generator=g)
    assert torch.equal(unpack_zeros(reference.awq_pack(zeros.T)), zeros)


def test_order_of_a_word() -> None:
    """0x76543210 holds column ORDER[i] in nibble i: AutoAWQ's interleaving, written out."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_zeros(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_without_qzeros_is_symmetric() -> None:
    tensors, weight = awq_tensors(64, 128, 128, zeros=False)
    tensors["qzeros"] = None
    layer = MarlinLinear.from_awq(**tensors)
    assert layer.zeros is None
    assert torch.equal(layer.dequantize(), weight.half())


def test_scales_of_another_dtype() -> None:
    tensors, _ = awq_tensors(64, 128, 64)
    kept = tensors["scales"]
    tensors["scales"] = kept.float()
    with pytest.raises(CheckpointError, match=r"q: scales: got float32.*pass dtype="):
        pack_awq(**tensors, layer="q")
    assert torch.equal(pack_awq(**tensors, dtype=torch.float16).scales, kept)
    with pytest.raises(CheckpointError, match=r"torch\.bfloat16 must hold every element exactly"):
        pack_awq(**tensors, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"dtype: got torch\.float64"):
        pack_awq(**tensors, dtype=torch.float64)


def test_strided_tensors() -> None:
    tensors, weight = awq_tensors(64, 128, 64)
    strided = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}
    assert torch.equal(MarlinLinear.from_awq(**strided).dequantize(), weight.half())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"qweight": torch.zeros(128, 8)}, ("qweight: got float32 [128, 8]", "int32")),
        ({"qweight": torch.zeros(128, dtype=torch.int32)}, ("qweight: got int32 [128]",)),
        ({"qweight": torch.zeros(0, 8, dtype=torch.int32)}, ("qweight: got int32 [0, 8]",)),
        ({"qweight": torch.zeros(16, 64, dtype=torch.int32)},
         ("scales: got float16 [2, 64]", "512 output features", "from_gptq")),
        ({"scales": torch.zeros(2, 64, dtype=torch.int32)}, ("scales: got int32",)),
        ({"scales": torch.zeros(64).half()}, ("scales: got float16 [64]", "[groups")),
        ({"scales": torch.zeros(2, 63).half()}, ("scales: got float16 [2, 63]", "[groups, 64]")),
        ({"scales": torch.zeros(3, 64).half(), "qzeros": None},
         ("scales: got 3 groups for in_features=128", "32, 64, 128")),
        ({"scales": torch.full((2, 64), float("nan")).half()}, ("scales: got nan at [0, 0]",)),
        ({"qzeros": torch.zeros(2, 64, dtype=torch.int32)},
         ("qzeros: got int32 [2, 64]", "int32 [2, 8]", "None for symmetric")),
        ({"qzeros": torch.zeros(2, 8)}, ("qzeros: got float32 [2, 8]",)),
        ({"qzeros": torch.zeros(2, 8, dtype=torch.int32, device="meta")},
         ("qzeros: got a tensor on meta", "on cpu", "qzeros.to('cpu')")),
    ],
)  # fmt: skip
def test_refused_tensors(changes: dict[str, Tensor | None], parts: tuple[str, ...]) -> None:
    tensors, _ = awq_tensors(64, 128, 64)
    with pytest.raises(CheckpointError) as caught:
        pack_awq(**{**tensors, **changes}, layer="model.layers.0.q_proj")
    for part in ("model.layers.0.q_proj: ", *parts):
        assert part in str(caught.value)


def test_every_problem_is_listed() -> None:
    with pytest.raises(CheckpointError) as caught:
        pack_awq(torch.zeros(4), None, torch.zeros(4))
    assert len(caught.value.refusals) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    tensors, _ = awq_tensors(64, 128, 64)
    tensors["scales"] = tensors["scales"].to(dtype).float()
    bias = torch.full((64,), 0.1)
    with pytest.raises(CheckpointError, match=r"scales: got float32.*pass dtype="):
        MarlinLinear.from_awq(**tensors, bias=bias)
    layer = MarlinLinear.from_awq(**tensors, bias=bias, dtype=dtype)
    assert torch.equal(layer.scales, tensors["scales"].to(dtype))
    assert torch.equal(layer.bias, bias.to(dtype))


def test_bias_must_fit() -> None:
    tensors, _ = awq_tensors(64, 128, 64)
    with pytest.raises(ValueError, match=r"bias: got float16 \[63\]"):
        MarlinLinear.from_awq(**tensors, bias=torch.zeros(63).half())
    with pytest.raises(CheckpointError, match=r"k: bias: got 0\.1.* exactly"):
        MarlinLinear.from_awq(**tensors, bias=torch.full((64,), 0.1), layer="k")


# ---- settings


def test_config() -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True,
              "version": "gemm", "modules_to_not_convert": ["visual"]}  # fmt: skip
    found = parse_awq_config(config)
    assert (found.group_size, found.zero_point) == (64, True)
    assert found.modules_to_not_convert == ("visual",)
    old = parse_awq_config({"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True})
    assert (old.group_size, old.modules_to_not_convert) == (128, ())
    assert parse_awq_config({**config, "modules_to_not_convert": None}).modules_to_not_convert == ()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"version": "gemv"}, ("version: got 'gemv'", "input features", "version='GEMM'")),
        ({"version": "GEMV"}, ("version: got 'GEMV'", "input features")),
        ({"version": "gemv_fast"}, ("version: got 'gemv_fast'", "16-bit words")),
        ({"version": "marlin"}, ("version: got 'marlin'", "original Marlin")),
        ({"version": "exllama"}, ("version: got 'exllama'", "not known here")),
        ({"version": 3}, ("version: got 3",)),
        ({"bits": 8}, ("bits: got 8", "4-bit")),
        ({"bits": None}, ("bits: got None",)),
        ({"bits": True}, ("bits: got True",)),
        ({"group_size": 256}, ("group_size: got 256", "-1, 32, 64 or 128")),
        ({"group_size": "128"}, ("group_size: got '128'",)),
        ({"zero_point": "yes"}, ("zero_point: got 'yes'",)),
        ({"modules_to_not_convert": "lm_head"}, ("modules_to_not_convert: got 'lm_head'",)),
        ({"modules_to_not_convert": [1]}, ("modules_to_not_convert: got [1]",)),
        ({"modules_to_not_convert": 7}, ("modules_to_not_convert: got 7",)),
        ({"quant_method": "gptq"}, ("quant_method: got 'gptq'", "'awq'")),
    ],
)  # fmt: skip
def test_refused_settings(changes: dict[str, object], parts: tuple[str, ...]) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    with pytest.raises(CheckpointError) as caught:
        parse_awq_config({**config, **changes})
    assert len(caught.value.refusals) == 1
    for part in ("AWQ quantization_config: ", *parts):
        assert part in str(caught.value)


def test_all_refused_settings_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_awq_config({"quant_method": "x", "bits": 3, "group_size": 7, "version": "gemv"})
    assert len(caught.value.refusals) == 4
