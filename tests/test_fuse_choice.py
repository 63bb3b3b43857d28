"""Which layers are fused, which are left and why; and FusedLinear by itself."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from fusable import (
    NAMES,
    Attention,
    Block,
    CountGemms,
    K,
    Mlp,
    Writes,
    assert_equal,
    fused_and_plain,
    fused_names,
    gradient,
    inputs,
    reasons,
)
from layers import assert_message, make_layer, make_layer_24
from torch import Tensor, nn

from marlin import FusedLinear, MarlinLinear, fuse, unfuse


def test_report() -> None:
    model = nn.Sequential(Block(), Mlp())
    model[1].gate = nn.Linear(K, 192).half()
    report = fuse(model)
    assert str(report) == (
        "layers                       shape\n"
        "0.attention: wq, wk, wv  232 x 256\n"
        "0.mlp: gate, up          384 x 256\n"
        "fused 5 layers into 2\n"
        "left as they were: 1\n"
        "  1.up  gate is a Linear, not packed"
    )
    assert json.loads(json.dumps(report.to_dict())) == {
        "fused": [
            {"names": [f"0.attention.{name}" for name in NAMES], "shape": [232, 256]},
            {"names": ["0.mlp.gate", "0.mlp.up"], "shape": [384, 256]},
        ],
        "skipped": [{"name": "1.up", "reason": "gate is a Linear, not packed"}],
    }
    assert fuse(model).to_dict()["fused"] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group_size": 32}, "its group_size is 32, that of wq is 64"),
        ({"zeros": True}, "its symmetry is asymmetric, that of wq is symmetric"),
        ({"perm": True}, "its act_order is True, that of wq is False"),
        ({"dtype": torch.bfloat16}, "its dtype is torch.bfloat16, that of wq is torch.float16"),
        ({"device": "meta"}, "its tensors are on the meta device; load them first"),
    ],
    ids=str,
)
def test_a_layer_that_differs_is_left(options: dict[str, Any], reason: str) -> None:
    model = Attention()
    model.wk = make_layer(64, K, **options) if "device" not in options else model.wk.to("meta")
    report = fuse(model)
    assert [layers.names for layers in report.fused] == [("wq", "wv")]
    (skipped,) = report.skipped
    assert skipped.name == "wk"
    assert skipped.reason.startswith(reason)


def test_a_layer_of_another_kind_is_left() -> None:
    model = Attention()
    model.wk = make_layer_24(64, K)
    assert reasons(model)["wk"].startswith(
        "its kind is MarlinLinear24, that of wq is MarlinLinear;"
    )
    model = Attention()
    model.wk.static_weights = True
    assert reasons(model)["wk"].startswith("its static_weights is True, that of wq is None")


def test_act_orders() -> None:
    model = Attention(perm=True)
    model.wk.perm.copy_(model.wk.perm.flip(0))
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert [layers.names for layers in report.fused] == [("wq", "wv")]
    (skipped,) = report.skipped
    other = "its act-order (perm) is not that of"
    assert (skipped.name, skipped.reason) == ("wk", f"{other} wq; {other} wv")
    assert_equal(model(inputs()), plain(inputs()))


def test_output_features_that_end_inside_a_block() -> None:
    model = Attention()
    model.wk = make_layer(72, K, seed=2)
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert [layers.names for layers in report.fused] == [("wq", "wk")]
    (skipped,) = report.skipped
    assert skipped.name == "wv"
    assert "its 40 output features are not a multiple of 64, nor are those of wk" in skipped.reason
    assert_equal(model(inputs()), plain(inputs()))


def test_layers_that_do_more_are_left() -> None:
    model = Attention()
    model.wk.register_forward_hook(lambda *_: None)
    assert "it has hooks" in reasons(model)["wk"]
    model = Attention()
    model.wk.forward = model.wk.forward
    assert "its forward was replaced on the instance" in reasons(model)["wk"]

    class Special(MarlinLinear):
        pass

    model = Attention()
    model.wk.__class__ = Special
    assert reasons(model)["wk"] == "Special is not a MarlinLinear or MarlinLinear24"
    model = nn.Sequential(Attention(), Attention())
    model[1].wk = model[0].wk
    assert reasons(model) == dict.fromkeys(("0.wk", "1.wk"), "it is in several places of the model")
    assert isinstance(model[0].wk, MarlinLinear)
    assert model[1].wk is model[0].wk


class Cross(Attention):
    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.wq(x), self.wk(other), self.wv(other)


def test_cross_attention() -> None:
    model = Cross()
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert [layers.names for layers in report.fused] == [("wk", "wv")]
    assert report.skipped == []  # nothing else shares its input
    with CountGemms() as gemms:
        outputs = model(inputs(), inputs(3))
    assert gemms.count == 2
    assert_equal(outputs, plain(inputs(), inputs(3)))


def test_layers_in_a_container_share_nothing() -> None:
    report = fuse(nn.Sequential(make_layer(K, K), make_layer(64, K)))
    assert report.to_dict() == {"fused": [], "skipped": []}
    assert fuse(make_layer()).fused == []


def test_a_forward_that_cannot_be_read() -> None:
    namespace: dict[str, Any] = {"Base": Attention}
    exec("class Model(Base):\n def forward(self, x): return self.wq(x), self.wk(x)", namespace)
    found = reasons(namespace["Model"]())
    assert found.keys() == set(NAMES)
    assert_message(AssertionError(found["wk"]), "source of forward cannot be read", "FusedLinear")


class Adapter(nn.Module):
    """A wrapper of a layer, as adapters put it into a model."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.scale


def test_adapters() -> None:
    """Around parts they change nothing; a layer with one is not seen by a later fuse."""
    model, plain = fused_and_plain(Attention())
    for each in (model, plain):
        each.wk = Adapter(each.wk)
    with CountGemms() as gemms:
        outputs = model(inputs())
    assert gemms.count == 1
    assert_equal(outputs, plain(inputs()))
    gradient(model)
    assert model.wk.scale.grad is not None
    assert fused_names(plain) == []
    assert isinstance(plain.wk.base_layer, MarlinLinear)


def test_a_forward_on_the_instance_is_read() -> None:
    model = Attention()
    model.forward = Writes.forward.__get__(model)
    assert fused_names(model) == [("wk", "wv")]


class TestGroups:
    def test_only_these(self) -> None:
        model = nn.Sequential(Block(), Attention())
        assert fused_names(model, groups=[("wq", "wv")]) == [
            ("0.attention.wq", "0.attention.wv"),
            ("1.wq", "1.wv"),
        ]
        assert isinstance(model[0].mlp.up, MarlinLinear)
        assert isinstance(model[1].wk, MarlinLinear)

    def test_several(self) -> None:
        model = Block()
        plain = copy.deepcopy(model)
        assert fused_names(model, groups=[NAMES, ["up", "gate"]]) == [
            tuple(f"attention.{name}" for name in NAMES),
            ("mlp.gate", "mlp.up"),
        ]
        assert torch.equal(model(inputs()), plain(inputs()))

    def test_that_share_no_input(self) -> None:
        model = nn.Sequential(Mlp())
        found = reasons(model, groups=[("gate", "down")])
        reason = "Mlp.forward calls no other of the group on the same variable"
        assert found == {"0.gate": reason, "0.down": reason}
        assert reasons(nn.Sequential(Cross()), groups=[NAMES]) == {
            "0.wq": "Cross.forward calls no other of the group on the same variable"
        }

    @pytest.mark.parametrize(
        ("groups", "error", "message"),
        [
            (["wq", "wk"], TypeError, "groups: got 'wq'; each group must be a sequence of names"),
            ("wq", TypeError, "groups: got 'w'"),
            (5, TypeError, "groups: got 5"),
            ([5], TypeError, "groups: got 5"),
            ([("wq", 1)], TypeError, "groups: got"),
            ([("wq",)], ValueError, "at least two names"),
            ([("wq", "wq")], ValueError, "at least two names"),
            ([("a.wq", "a.wk")], ValueError, "without dots"),
            ([("wq", "wx")], ValueError, "no module of the model has children of these names"),
        ],
        ids=str,
    )
    def test_refused(self, groups: Any, error: type[Exception], message: str) -> None:
        model = Attention()
        with pytest.raises(error) as caught:
            fuse(model, groups=groups)
        assert message in str(caught.value)
        assert isinstance(model.wq, MarlinLinear)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model: got list"):
        fuse([])


class Own(nn.Module):
    """A forward that fuse would not read, with a FusedLinear of its own."""

    def __init__(self) -> None:
        super().__init__()
        plain = Attention(bias=True)
        self.qkv = FusedLinear([plain.wv, plain.wq, plain.wk])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x)


def test_fused_linear_of_your_own() -> None:
    plain = Attention(bias=True)
    model = Own()
    v, q, k = model(inputs())
    assert_equal((q, k, v), plain(inputs()))
    assert list(model.state_dict()) == [
        "qkv.packed.qweight",
        "qkv.packed.scales",
        "qkv.packed.bias",
    ]
    other = Own()
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert_equal(other(inputs()), model(inputs()))
    assert fuse(model).to_dict() == {"fused": [], "skipped": []}
    assert unfuse(model) == 0
    assert repr(model.qkv).startswith("FusedLinear(\n  sizes=(40, 128, 64)\n")
    torch._dynamo.reset()
    assert_equal(torch.compile(model, fullgraph=True, backend="eager")(inputs()), model(inputs()))


def test_fused_linear_refuses() -> None:
    wq = make_layer(128, K)
    for layers, message in [
        ([], "layers: got none"),
        ([wq, make_layer(64, 128)], r"layers\[1\]: its in_features is 128, that of layers\[0\]"),
        ([wq, nn.Linear(K, 64)], r"layers\[1\]: Linear is not a MarlinLinear"),
        ([make_layer(40, K), wq, make_layer(72, K)], r"got \[40, 128, 72\] .*layers\[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            FusedLinear(layers)
