"""MarlinLinear copied, cast, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import assert_message, assert_same, make_layer
from torch import Tensor, nn

from marlin import MarlinLinear


@pytest.mark.parametrize(
    "options", [{}, {"zeros": True}, {"perm": True, "bias": True}, {"zeros": True, "perm": True}],
    ids=str,
)  # fmt: skip
def test_round_trips(options: dict[str, bool], tmp_path: Path) -> None:
    layer = make_layer(**options)
    assert_same(copy.deepcopy(layer), layer)
    assert_same(pickle.loads(pickle.dumps(layer)), layer)
    torch.save(layer, tmp_path / "layer.pt")
    assert_same(torch.load(tmp_path / "layer.pt", weights_only=False), layer)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {"qweight", "scales", *options}
    for assign in (False, True):
        flags = {"bias": False, **options}
        fresh = MarlinLinear(200, 72, group_size=64, device="meta" if assign else None, **flags)
        fresh.load_state_dict(state, assign=assign)
        assert_same(fresh, layer)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make_layer(zeros=True, perm=True, bias=True)
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    fresh = MarlinLinear(200, 72, group_size=64, zeros=True, perm=True)
    safetensors.load_model(fresh, str(tmp_path / "layer.safetensors"))
    assert_same(fresh, layer)


def test_meta() -> None:
    layer = MarlinLinear(200, 72, device="meta", zeros=True, perm=True)
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert layer(torch.empty(3, 200, dtype=torch.float16, device="meta")).shape == (3, 72)
    assert layer.dequantize().shape == (72, 200)
    layer.bfloat16().to_empty(device="cpu")
    assert layer.scales.dtype == torch.bfloat16
    assert not layer.qweight.is_meta
    made = MarlinLinear.from_linear(nn.Linear(200, 72, device="meta"), symmetric=False)
    assert made.qweight.shape == layer.qweight.shape
    assert made.zeros is not None


def test_casts(device: str) -> None:
    layer = make_layer(zeros=True, perm=True, bias=True, device=device)
    scales, qweight = layer.scales.clone(), layer.qweight.clone()
    layer.bfloat16()
    assert layer.scales.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scales, scales.bfloat16())
    assert torch.equal(layer.qweight, qweight)
    assert layer.zeros.dtype == torch.uint8
    assert layer.perm.dtype == torch.int32
    assert layer(torch.randn(2, 200, device=device).bfloat16()).dtype == torch.bfloat16
    assert layer.half().scales.dtype == torch.float16
    assert layer.to("cpu").share_memory().qweight.is_shared()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float32),
        lambda m: nn.Sequential(m).float(),
        lambda m: m.to(torch.float8_e5m2),
    ],
)
def test_refused_casts(cast: Callable[[nn.Module], object]) -> None:
    layer = make_layer(bias=True)
    before = copy.deepcopy(layer)
    with pytest.raises(TypeError) as caught:
        cast(layer)
    assert_message(
        caught.value, "MarlinLinear: got a cast to torch.float", ".half()", ".bfloat16()"
    )
    assert_same(layer, before)


def test_cast_of_every_buffer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"qweight holds packed codes"):
        make_layer().type(torch.float16)


def test_cast_beyond_the_range_is_refused() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    layer.scales[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"scales up to 999424; its largest number is 65504"):
        layer.half()
    assert layer.scales.dtype == torch.bfloat16


def test_cast_of_scales_to_zero_is_refused() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    layer.scales[0, 0] = 1e-9
    with pytest.raises(ValueError, match=r"scales down to 9.9.*e-10, which become 0"):
        layer.half()
    layer.scales[0, 0] = 0
    assert layer.half().scales[0, 0] == 0


@pytest.mark.parametrize("assign", [True, False])
def test_state_of_another_number_of_features(assign: bool, tmp_path: Path) -> None:
    """250 and 200 features are padded to the same tensors."""
    wide, layer = make_layer(k=250), make_layer()
    assert wide.qweight.shape == layer.qweight.shape
    torch.save(nn.ModuleDict({"q_proj": wide}).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"q_proj.qweight", "q_proj.scales"}
    with pytest.raises(RuntimeError) as caught:
        nn.ModuleDict({"q_proj": layer}).load_state_dict(state, assign=assign)
    assert_message(caught.value, "q_proj: got the state of a layer with in_features=250",
                   "this one has 200 and 72")  # fmt: skip
    assert_same(layer, make_layer())
    nn.ModuleDict({"q_proj": make_layer(k=250)}).load_state_dict(state, assign=assign)
    layer.load_state_dict(dict(make_layer().state_dict()))  # a plain dict says nothing of it


def test_misaligned_tensors_are_copied() -> None:
    """As a file mapped into memory gives them."""
    whole = make_layer(bias=True)
    shifted = {}
    for name, tensor in whole.state_dict().items():
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[name] = memory[1:].view_as(tensor).copy_(tensor)
        assert shifted[name].data_ptr() % 16
    loaded = MarlinLinear(200, 72, group_size=64, device="meta")
    loaded.load_state_dict(shifted, assign=True)
    made = MarlinLinear.from_packed(**shifted, in_features=200, out_features=72)
    for layer in (loaded, made):
        assert_same(layer, whole)
        assert all(buffer.data_ptr() % 16 == 0 for buffer in layer.buffers())
        assert layer(torch.randn(2, 200).half()).shape == (2, 72)


@pytest.mark.parametrize("key", ["zeros", "perm", "bias"])
@pytest.mark.parametrize("strict", [True, False])
def test_optional_buffer_in_one_place_only(key: str, strict: bool) -> None:
    with_it = make_layer(**{key: True})
    without = make_layer()
    for target, source, value in ((without, with_it, True), (with_it, without, False)):
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError) as caught:
            nn.ModuleDict({"q_proj": target}).load_state_dict(
                nn.ModuleDict({"q_proj": source}).state_dict(), strict=strict
            )
        assert_message(caught.value, f"q_proj: got {'a' if value else 'no'} 'q_proj.{key}'",
                       "must agree", f"MarlinLinear(..., {key}={value})")  # fmt: skip
        assert_same(target, before)


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ({"weight": torch.zeros(72, 200)}, ("'weight'", "unquantised", "replace_linear")),
        ({"qzeros": torch.zeros(1)}, ("'qzeros'", "GPTQ or AWQ", "marlin convert")),
        ({"weight_packed": torch.zeros(1)}, ("'weight_packed'", "from_compressed_tensors")),
        ({"scales": torch.zeros(2, 72).half()},
         ("scales: got float16 [2, 72]", "group_size=64", "holds float16 [4, 72]", "group size")),
        ({"qweight": torch.zeros(2, 4, 512)},
         ("qweight: got float32", "must be int32", "damaged")),
        ({"perm": torch.zeros(200, dtype=torch.int32)}, ("perm: got values 0..0", "once")),
        ({"zeros": torch.full((4, 72), 99, dtype=torch.uint8)}, ("zeros: got 99", "0..15")),
        ({"scales": torch.full((4, 72), float("nan")).half()}, ("scales: got NaN", "damaged")),
        ({"scales": torch.full((4, 72), 1e6)}, ("scales: got a cast", "up to 1e+06", "65504")),
        ({"scales": torch.full((4, 72), 1e-20)}, ("scales: got a cast", "which become 0 in it")),
        ({"scales": torch.ones(4, 72).half().numpy()}, ("scales: got a ndarray", "torch.Tensor")),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(state: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    layer, before = make_layer(zeros=True, perm=True), make_layer(zeros=True, perm=True)
    others = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    others["qweight"] += 1
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict({**others, **state})
    assert_message(caught.value, *parts)
    assert_same(layer, before)


def test_state_dict_of_another_float_dtype() -> None:
    layer = make_layer()
    state = make_layer(dtype=torch.bfloat16).state_dict()
    layer.load_state_dict(state)
    assert layer.scales.dtype == torch.float16
    with pytest.raises(RuntimeError, match="cast it, or load with assign=False"):
        layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("key", "other"), [("scales", "qweight"), ("qweight", "scales")])
def test_half_a_layer_is_refused_before_it_is_copied(key: str, other: str, strict: bool) -> None:
    layer, before = make_layer(), make_layer()
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    del state[key]
    with pytest.raises(RuntimeError, match=f"got '{other}' without '{key}'"):
        layer.load_state_dict(state, strict=strict)
    assert_same(layer, before)


def test_missing_and_unexpected_keys_are_torchs_own() -> None:
    layer = make_layer(bias=True)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=re.escape('Unexpected key(s) in state_dict: "more"')):
        layer.load_state_dict({**state, "more": torch.zeros(1)})
    layer = make_layer()
    assert layer.load_state_dict({}, strict=False).missing_keys == ["qweight", "scales"]
