"""fuse: one GEMM for layers on one input, right whatever calls them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from fusable import (
    MODES,
    NAMES,
    OPTIONS,
    Attention,
    Block,
    CountGemms,
    K,
    Writes,
    assert_equal,
    assert_slots_are_empty,
    fused_and_plain,
    inputs,
    reasons,
    sparse_layer,
)
from layers import layer_and_weight_24, make_layer
from operands import DTYPES, make_input
from torch import Tensor, nn

from marlin import FusedLinear, MarlinLinear24, fuse


@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense(device: str, dtype: torch.dtype, options: dict[str, bool], m: int) -> None:
    model, plain = fused_and_plain(Attention(dtype=dtype, device=device, **options))
    x = make_input(m, K, dtype=dtype, device=device)
    with CountGemms() as gemms:
        outputs = model(x)
    assert gemms.count == 1
    layers = [getattr(plain, name) for name in NAMES]
    weight = torch.cat(
        [reference.dequantize64(w.qweight, w.scales, w.zeros, w.perm, K) for w in layers]
    )
    bias = torch.cat([layer.bias for layer in layers]) if "bias" in options else None
    reference.assert_close(torch.cat(outputs, -1), x, weight, bias, group_size=64)
    for name, layer, y in zip(NAMES, layers, outputs, strict=True):
        assert torch.equal(getattr(model, name).dequantize(), layer.dequantize())
        if device == "cpu":  # where no sum depends on other rows
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("options", [{}, {"zeros": True, "bias": True}], ids=str)
def test_sparse(device: str, options: dict[str, bool]) -> None:
    make = [layer_and_weight_24(n, K, device=device, **options) for n in (128, 40)]
    layers, weights = [layer for layer, _ in make], [weight for _, weight in make]
    x = inputs(device=device)
    with CountGemms() as gemms:
        outputs = FusedLinear(layers)(x)
    assert gemms.count == 1
    bias = torch.cat([layer.bias for layer in layers]) if "bias" in options else None
    y, weight = torch.cat(outputs, -1), torch.cat(weights)
    reference.assert_close(y, x, weight, bias, group_size=64, sparse=True)
    assert isinstance(FusedLinear(layers).packed, MarlinLinear24)


def test_sparse_in_a_model() -> None:
    model, plain = fused_and_plain(Attention(sparse_layer))
    with CountGemms() as gemms:
        outputs = model(inputs())
    assert gemms.count == 1
    assert_equal(outputs, plain(inputs()))
    assert torch.equal(model.wv.places, plain.wv.places)
    assert not hasattr(model.wv, "perm")


def test_a_bias_beside_none() -> None:
    model = Attention(bias=True)
    model.wk = make_layer(64, K, seed=2)
    model, plain = fused_and_plain(model)
    assert_equal(model(inputs()), plain(inputs()))
    assert model.wk.bias is None
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K), (1, 1, K)], ids=str)
def test_leading_shapes(device: str, shape: tuple[int, ...]) -> None:
    model, plain = fused_and_plain(Attention(device=device))
    x = torch.randn(shape, device=device).half()
    for y, z in zip(model(x), plain(x), strict=True):
        assert y.shape == z.shape
        assert y.is_contiguous() == (x.numel() <= K)
        torch.testing.assert_close(y, z, rtol=1e-2, atol=1e-2)


def test_input_that_does_not_fit() -> None:
    model, _ = fused_and_plain(Attention())
    with pytest.raises(RuntimeError, match="got 255 features"):
        model(torch.randn(2, 255).half())
    with pytest.raises(RuntimeError, match=r"input|scales"):
        model(torch.randn(2, K))
    assert_slots_are_empty(model)


def test_forward_mode_derivatives() -> None:
    model, plain = fused_and_plain(Attention())
    found, want = (torch.func.jvp(m, (inputs(),), (inputs(seed=2),)) for m in (model, plain))
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert_slots_are_empty(model)


# Never a stale result


@pytest.mark.parametrize("mode", MODES)
def test_one_gemm_in_each_mode(mode: Any) -> None:
    model, plain = fused_and_plain(Block())
    with mode(), CountGemms() as gemms:
        y = model(inputs())
    assert gemms.count == 3
    assert torch.equal(y, plain(inputs()))
    assert_slots_are_empty(model)


@pytest.mark.parametrize("mode", MODES)
def test_calls_from_outside(mode: Any) -> None:
    """Of parts themselves: in any order, twice, and with an input written in between."""
    model, plain = fused_and_plain(Attention())
    with mode():
        x, other = inputs(), inputs(seed=2)
        for name in ("wk", "wq", "wq", "wv", "wk"):
            assert torch.equal(getattr(model, name)(x), getattr(plain, name)(x))
            assert torch.equal(getattr(model, name)(other), getattr(plain, name)(other))
            x.data.mul_(2)  # leaves no trace in the version
            x.add_(1)
    assert_slots_are_empty(model)


class Calls(Attention):
    """``forward`` is proved harmless, but does more, by way of a hook on ``wq``."""

    def __init__(self, after_q: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.after_q = after_q

    def hook(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.after_q(self, args[0])


def write(model: Attention, x: Tensor) -> None:
    x.mul_(2)


def call_on_another(model: Attention, x: Tensor) -> None:
    model.wk(x + 1)


def call_twice(model: Attention, x: Tensor) -> None:
    model.wk(x)
    model.wk(x)
    model.wv(x)


@pytest.mark.parametrize("after_q", [write, call_on_another, call_twice])
def test_within_forward(after_q: Callable[[Any, Tensor], object]) -> None:
    model, plain = fused_and_plain(Calls(after_q))
    for each in (model, plain):
        each.wq.register_forward_hook(each.hook)
    with torch.no_grad():
        assert_equal(model(inputs()), plain(inputs()))
    assert_slots_are_empty(model)


def test_an_input_that_forward_writes_is_two_inputs() -> None:
    model = Writes()
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert [layers.names for layers in report.fused] == [("wk", "wv")]
    (skipped,) = report.skipped
    assert skipped.name == "wq"
    assert skipped.reason == "forward calls x.mul_, which may write a tensor between the calls on x"
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal(model(inputs()), plain(inputs()))
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert_equal(compiled(inputs()), plain(inputs()))
        torch._dynamo.reset()


class Helper(Attention):
    """``wk`` is called by another method, which leaves nothing to be taken by the run."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.warm_up(x)
        x.data.mul_(2)
        return self.wq(x), self.wk(x), self.wv(x)

    def warm_up(self, x: Tensor) -> Tensor:
        return self.wk(x)


def test_a_layer_that_other_methods_call_is_left() -> None:
    model = Helper()
    plain = copy.deepcopy(model)
    assert reasons(model) == {"wk": "it is called in 2 places of the source"}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal(model(inputs()), plain(inputs()))


def test_only_the_first_part_leaves_something() -> None:
    """So code that fuse could not read, here a hook, does not either."""
    model, plain = fused_and_plain(Attention())
    for each in (model, plain):
        each.register_forward_pre_hook(lambda module, args: (module.wk(args[0]), None)[1])
        each.register_forward_pre_hook(lambda module, args: (args[0].data.mul_(2), None)[1])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal(model(inputs()), plain(inputs()))


class Raises(Attention):
    broken = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x)
        k = self.wk(x)
        v = self.wv(self.checked(x))
        return q, k, v

    def checked(self, x: Tensor) -> Tensor:
        if self.broken:
            raise KeyError("broken")
        return x


def test_an_error_leaves_nothing_to_take() -> None:
    model, plain = fused_and_plain(Raises())
    model.broken = True
    x = inputs()
    with pytest.raises(KeyError):
        model(x)
    assert_slots_are_empty(model)
    model.broken = False
    x.data.mul_(2)
    assert_equal(model(x), plain(x))


def test_threads() -> None:
    model, plain = fused_and_plain(Block())
    xs = [inputs(seed=seed) for seed in range(4)]
    want = [plain(x) for x in xs]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(xs[index]), want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
