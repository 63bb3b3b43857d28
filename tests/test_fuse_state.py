"""Fused layers are saved, loaded, cast, copied and taken apart as if they were not fused."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from fusable import (
    NAMES,
    OPTIONS,
    Attention,
    Block,
    CountGemms,
    K,
    assert_equal,
    assert_equal_states,
    fused_and_plain,
    inputs,
    sparse_layer,
    state_of,
)
from layers import assert_message, assert_same, make_layer
from operands import make_input
from torch import nn

from marlin import FusedLinear, MarlinLinear, fuse, unfuse


@pytest.mark.parametrize(
    ("make", "options"),
    [*((make_layer, options) for options in OPTIONS), (sparse_layer, {"zeros": True})],
    ids=str,
)
def test_state_dict(make: Any, options: dict[str, bool]) -> None:
    model, plain = fused_and_plain(Attention(make, **options))
    assert_equal_states(model, plain)
    assert list(state_of(model)) == list(state_of(plain))
    metadata = model.state_dict()._metadata["wv"]
    assert (metadata["in_features"], metadata["out_features"]) == (K, 40)
    through_bytes = safetensors.torch.load(safetensors.torch.save(state_of(model)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for state in (through_bytes, torch.load(file)):
        for assign in (False, True):
            for fuse_it in (False, True):
                other = Attention(make, **options)
                for name, tensor in other.named_buffers():
                    if not name.endswith("perm") or not fuse_it:
                        tensor.zero_()
                if fuse_it:
                    fuse(other)
                assert other.load_state_dict(state, assign=assign).missing_keys == []
                assert_equal_states(other, plain)
                assert_equal(other(inputs()), plain(inputs()))


def test_loading_is_noticed() -> None:
    """By the promise to the kernels that weights have not changed."""
    model, _ = fused_and_plain(Attention())
    packed = model.fused_wq_wk_wv.packed
    for _ in range(2):
        model(inputs())
    assert packed._weights_are_static()
    model.load_state_dict(model.state_dict())
    assert not packed._weights_are_static()


def test_loading_what_does_not_fit() -> None:
    model, plain = fused_and_plain(Attention(perm=True, bias=True))
    good = state_of(plain)
    for name, tensor, parts in [
        ("wq.scales", torch.zeros(4, 64).half(), ["wq.scales", "float16 [4, 64]"]),
        ("wk.qweight", good["wk.qweight"][:, :1], ["wk.qweight", "[1, 1, 512]"]),
        ("wv.bias", None, ["wv", "no 'wv.bias'"]),
        ("wq.weight", torch.zeros(128, K), ["wq: got 'wq.weight'", "unquantised layer"]),
        ("wk.perm", torch.arange(K).int(), ["wk.perm", "another order", "wq, wk, wv", "unfuse"]),
    ]:
        state = {key: value for key, value in good.items() if key != name}
        if tensor is not None:
            state[name] = tensor
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        assert_message(caught.value, *parts)
        assert_equal_states(model, plain)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*wq\.more"):
        model.load_state_dict({**good, "wq.more": torch.zeros(1)})


def test_loading_into_meta_tensors() -> None:
    model, plain = fused_and_plain(Attention())
    state = state_of(plain)
    model.to("meta")
    with pytest.raises(
        RuntimeError, match=r"wq\.qweight: the fused tensors are on the meta device"
    ):
        model.load_state_dict(state, assign=True)
    model.to_empty(device="cpu").load_state_dict(state)
    assert_equal(model(inputs()), plain(inputs()))


def test_cast_and_move(device: str) -> None:
    model, plain = fused_and_plain(Attention(bias=True, perm=True, zeros=True))
    model, plain = model.to(device, torch.bfloat16), plain.to(device, torch.bfloat16)
    assert_equal_states(model, plain)
    x = make_input(3, K, dtype=torch.bfloat16, device=device)
    for y, z in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(y, z, rtol=2e-2, atol=2e-2)
    with pytest.raises(TypeError, match=r"MarlinLinear: got a cast to torch\.float32"):
        model.float()


def test_attributes_of_a_part() -> None:
    model, plain = fused_and_plain(Attention(zeros=True, perm=True, bias=True))
    for name in NAMES:
        part, layer = getattr(model, name), getattr(plain, name)
        for attribute in ("in_features", "out_features", "group_size", "training"):
            assert getattr(part, attribute) == getattr(layer, attribute)
        for tensor in ("qweight", "scales", "zeros", "perm", "bias"):
            assert torch.equal(getattr(part, tensor), getattr(layer, tensor))
    with pytest.raises(AttributeError, match=r"has no 'weight'.*layer\.dequantize\(\)"):
        _ = model.wq.weight
    assert not hasattr(model.wq, "places")
    model.wq.static_weights = True
    assert model.wk.static_weights is model.fused_wq_wk_wv.packed.static_weights is True
    assert repr(model.wq) == "FusedPart(in_features=256, out_features=128)"
    assert "FusedLinear(\n    wq, wk, wv\n    (packed): MarlinLinear(in_features=256, " in repr(
        model
    )
    assert sum(t.numel() for t in model.buffers()) < sum(t.numel() for t in plain.buffers())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone: Callable[[Any], Any]) -> None:
    model, plain = fused_and_plain(Block())
    other = clone(model)
    for tensor in model.buffers():
        tensor.zero_()
    with CountGemms() as gemms:
        y = other(inputs())
    assert gemms.count == 3
    assert torch.equal(y, plain(inputs()))
    assert unfuse(other) == 5
    assert torch.equal(other(inputs()), plain(inputs()))
    assert not other.attention._forward_hooks
    assert model.attention._forward_hooks
    part = clone(fused_and_plain(copy.deepcopy(plain))[0].attention.wk)
    assert torch.equal(part(inputs()), plain.attention.wk(inputs()))


def test_unfuse() -> None:
    model, plain = fused_and_plain(Block())
    refs = [weakref.ref(tensor) for tensor in model.buffers()]
    assert unfuse(model) == 5
    assert_equal_states(model, plain)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    for name, layer in plain.named_modules():
        if isinstance(layer, MarlinLinear):
            assert_same(model.get_submodule(name), layer)
    assert torch.equal(model(inputs()), plain(inputs()))
    for module in (model.attention, model.mlp):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    assert sum(ref() is not None for ref in refs) == 2  # down_proj's own
    assert unfuse(model) == 0
    assert len(fuse(model).fused) == 2


def test_unfuse_refuses_to_lose_something() -> None:
    model, _ = fused_and_plain(Block())
    part = model.mlp.up
    handle = part.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"in mlp up has hooks.*nothing has been changed"):
        unfuse(model)
    handle.remove()
    model.mlp.up = nn.Sequential(part)  # as an adapter's wrapper
    with pytest.raises(ValueError, match="in mlp up is a Sequential now"):
        unfuse(model)
    assert model.attention._forward_hooks
    assert isinstance(model.attention.fused_wq_wk_wv, FusedLinear)
    with pytest.raises(TypeError, match="model: got int"):
        unfuse(1)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the original tensors those of one group stay while its copy is made."""
    model = nn.Sequential(*(Block() for _ in range(3)))
    refs = {
        name: weakref.ref(tensor)
        for name, tensor in model.named_buffers()
        if "down" not in name and "qweight" in name
    }
    alive: list[int] = []
    attach = FusedLinear.attach

    def spy(*args: Any) -> None:
        alive.append(sum(ref() is not None for ref in refs.values()))
        attach(*args)

    monkeypatch.setattr(FusedLinear, "attach", spy)
    fuse(model)
    assert alive == [15, 12, 10, 7, 5, 2]
    assert not any(ref() is not None for ref in refs.values())
