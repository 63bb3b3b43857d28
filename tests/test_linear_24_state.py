"""MarlinLinear24 copied, cast, saved, loaded, and watched for writes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import assert_message, assert_same, make_layer, make_layer_24
from torch import Tensor, nn

from marlin import MarlinLinear, MarlinLinear24

ALL = {"zeros": True, "bias": True}


@pytest.mark.parametrize("options", [{}, {"zeros": True}, ALL], ids=str)
def test_round_trips(options: dict[str, bool], tmp_path: Path) -> None:
    layer = make_layer_24(**options)
    assert_same(copy.deepcopy(layer), layer)
    assert_same(pickle.loads(pickle.dumps(layer)), layer)
    torch.save(layer, tmp_path / "layer.pt")
    assert_same(torch.load(tmp_path / "layer.pt", weights_only=False), layer)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {"qweight", "places", "scales", *options}
    for assign in (False, True):
        flags = {"bias": False, **options}
        fresh = MarlinLinear24(200, 72, group_size=64, device="meta" if assign else None, **flags)
        fresh.load_state_dict(state, assign=assign)
        assert_same(fresh, layer)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make_layer_24(**ALL)
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    fresh = MarlinLinear24(200, 72, group_size=64, zeros=True)
    safetensors.load_model(fresh, str(tmp_path / "layer.safetensors"))
    assert_same(fresh, layer)


def test_casts(device: str) -> None:
    layer = make_layer_24(**ALL, device=device)
    before = copy.deepcopy(layer)
    layer.bfloat16()
    assert layer.scales.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scales, before.scales.bfloat16())
    assert torch.equal(layer.qweight, before.qweight)
    assert torch.equal(layer.places, before.places)
    assert layer(torch.randn(2, 200, device=device).bfloat16()).dtype == torch.bfloat16
    assert layer.half().scales.dtype == torch.float16
    assert layer.to("cpu").share_memory().places.is_shared()
    meta = MarlinLinear24(200, 72, device="meta").bfloat16().to_empty(device="cpu")
    assert meta.scales.dtype == torch.bfloat16


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
    layer = make_layer_24(bias=True)
    before = copy.deepcopy(layer)
    with pytest.raises(TypeError) as caught:
        cast(layer)
    assert_message(caught.value, "MarlinLinear24: got a cast to torch.float", ".half()")
    assert_same(layer, before)


def test_casts_of_integers_and_beyond_the_range_are_refused() -> None:
    with pytest.raises(TypeError, match=r"MarlinLinear24: .*qweight holds packed codes"):
        make_layer_24().type(torch.float16)
    layer = make_layer_24(dtype=torch.bfloat16)
    layer.scales[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"MarlinLinear24: .*scales up to 999424"):
        layer.half()


@pytest.mark.parametrize("assign", [True, False])
def test_state_of_another_number_of_features(assign: bool) -> None:
    """252 and 200 features are padded to the same tensors."""
    wide, layer = make_layer_24(k=252), make_layer_24()
    assert wide.places.shape == layer.places.shape
    state = nn.ModuleDict({"q_proj": wide}).state_dict()
    with pytest.raises(RuntimeError) as caught:
        nn.ModuleDict({"q_proj": layer}).load_state_dict(state, assign=assign)
    assert_message(caught.value, "q_proj: got the state of a layer with in_features=252",
                   "this one has 200 and 72")  # fmt: skip
    assert_same(layer, make_layer_24())
    nn.ModuleDict({"q_proj": make_layer_24(k=252)}).load_state_dict(state, assign=assign)


def test_misaligned_tensors_are_copied() -> None:
    """As a file mapped into memory gives them."""
    whole = make_layer_24(bias=True)
    shifted = {}
    for name, tensor in whole.state_dict().items():
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[name] = memory[1:].view_as(tensor).copy_(tensor)
        assert shifted[name].data_ptr() % 16
    loaded = MarlinLinear24(200, 72, group_size=64, device="meta")
    loaded.load_state_dict(shifted, assign=True)
    made = MarlinLinear24.from_packed(**shifted, in_features=200, out_features=72)
    for layer in (loaded, made):
        assert_same(layer, whole)
        assert all(buffer.data_ptr() % 16 == 0 for buffer in layer.buffers())
        assert layer(torch.randn(2, 200).half()).shape == (2, 72)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("target", "source", "parts"),
    [
        (make_layer_24, make_layer,
         ("q_proj: got 'q_proj.qweight' and 'q_proj.scales' without 'q_proj.places'",)),
        (make_layer_24, lambda **o: make_layer(perm=True, **o),
         ("q_proj: got 'q_proj.perm'; that is a layer with act-order", "MarlinLinear")),
        (make_layer, make_layer_24,
         ("q_proj: got 'q_proj.places'; that is a 2:4 sparse layer", "MarlinLinear24")),
    ],
    ids=["dense", "ordered", "sparse"],
)  # fmt: skip
@pytest.mark.parametrize("k", [64, 200])  # of 64 features, qweight has one shape in both
def test_state_of_the_other_kind(
    k: int,
    target: Callable[..., nn.Module],
    source: Callable[..., nn.Module],
    parts: tuple[str, ...],
    strict: bool,
) -> None:
    layer, before = target(k=k), target(k=k)
    state = nn.ModuleDict({"q_proj": source(k=k)}).state_dict()
    with pytest.raises(RuntimeError) as caught:
        nn.ModuleDict({"q_proj": layer}).load_state_dict(state, strict=strict)
    assert_message(caught.value, *parts)
    assert_same(layer, before)


@pytest.mark.parametrize("key", ["zeros", "bias"])
def test_optional_buffer_in_one_place_only(key: str) -> None:
    with_it, without = make_layer_24(**{key: True}), make_layer_24()
    for target, source, value in ((without, with_it, True), (with_it, without, False)):
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError) as caught:
            target.load_state_dict(source.state_dict())
        assert_message(caught.value, f"got {'a' if value else 'no'} '{key}'",
                       f"MarlinLinear24(..., {key}={value})")  # fmt: skip
        assert_same(target, before)


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ({"weight": torch.zeros(72, 200)}, ("MarlinLinear24: got 'weight'", "unquantised")),
        ({"qzeros": torch.zeros(1)}, ("'qzeros'", "GPTQ or AWQ")),
        ({"weight_packed": torch.zeros(1)}, ("'weight_packed'", "from_compressed_tensors")),
        ({"places": torch.zeros(2, 2, 512, dtype=torch.int32)},
         ("places: got int32 [2, 2, 512]", "holds int32 [2, 2, 256]")),
        ({"places": torch.zeros(2, 2, 256)}, ("places: got float32", "must be int32", "damaged")),
        ({"places": torch.zeros(2, 2, 256, dtype=torch.int32)},
         ("places: got 0x00000000 at [0, 0, 0]", "must rise")),
        ({"zeros": torch.full((4, 72), 99, dtype=torch.uint8)}, ("zeros: got 99", "0..15")),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(state: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    layer = make_layer_24(zeros=True)
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict({**layer.state_dict(), **state})
    assert_message(caught.value, *parts)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", ["qweight", "places", "scales"])
def test_part_of_a_layer_is_refused_before_it_is_copied(key: str, strict: bool) -> None:
    layer, before = make_layer_24(), make_layer_24()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state[{"qweight": "scales"}.get(key, "qweight")] += 1
    del state[key]
    with pytest.raises(RuntimeError, match=f"without '{key}'; codes mean nothing without"):
        layer.load_state_dict(state, strict=strict)
    assert_same(layer, before)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["qweight", "places", "scales"]


def promises(layer: MarlinLinear | MarlinLinear24) -> list[bool]:
    return [layer._weights_are_static() for _ in range(2)]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.places.add_(0),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer._buffers.update(places=layer.places.clone()),
        lambda layer: setattr(layer, "bias", torch.zeros(72, dtype=torch.float16)),
    ],
)
def test_promise_is_withdrawn_after_a_change(change: Callable[[MarlinLinear24], object]) -> None:
    layer = make_layer_24()
    assert promises(layer) == [False, True]
    change(layer)
    assert promises(layer) == [False, True]
    assert promises(copy.deepcopy(layer)) == [False, True]


def test_promise_can_be_set_by_hand() -> None:
    layer = make_layer_24()
    for value in (False, True):
        layer.static_weights = value
        assert promises(layer) == [value, value]


@pytest.mark.parametrize("promise", [None, True])
def test_exported_graphs_promise_only_if_told(promise: bool | None) -> None:
    layer, x = make_layer_24(), torch.randn(2, 200).half()
    layer.static_weights = promise
    promises(layer)
    graph = torch.export.export(layer, (x,)).graph
    (call,) = [node for node in graph.nodes if "gemm_24" in str(node.target)]
    assert bool(call.kwargs.get("static_weights")) == bool(promise)
