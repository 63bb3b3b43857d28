"""fuse: one GEMM for layers on one input, right whatever calls them, and saved as if not fused."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference
import safetensors.torch
import torch
from layers import assert_message, assert_same, layer_and_weight_24, make_layer, make_layer_24
from operands import DTYPES, make_input
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from marlin import FusedLinear, MarlinLinear, MarlinLinear24, fuse, replace_linear, unfuse

K = 256
OPTIONS = [{}, {"bias": True}, {"zeros": True}, {"perm": True, "bias": True}]
NAMES = ("wq", "wk", "wv")


class CountGemms(TorchDispatchMode):
    """How many GEMMs run within the context, in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(op).startswith("marlin.gemm")
        return op(*args, **(kwargs or {}))


class Attention(nn.Module):
    """The projections of one; ``wv`` ends inside a block of 64 rows."""

    def __init__(self, make: Callable[..., nn.Module] = make_layer, **options: Any) -> None:
        super().__init__()
        self.wv = make(40, K, seed=3, **options)
        self.wq = make(128, K, seed=1, **options)
        self.wk = make(64, K, seed=2, **options)
        if options.get("perm"):  # one input has one order
            for layer in (self.wk, self.wv):
                layer.perm.copy_(self.wq.perm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x)
        k = self.wk(x)
        v = self.wv(x)
        return q, k, v


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = make_layer(192, K, seed=4), make_layer(192, K, seed=5)
        self.down = make_layer(K, 192, seed=6)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(x)
        return x + self.mlp(x) + torch.cat([q, k, v], -1).mean(-1, keepdim=True)


def fused_and_plain(model: nn.Module) -> tuple[Any, Any]:
    plain = copy.deepcopy(model)
    fuse(model)
    return model, plain


def inputs(m: int = 5, device: str = "cpu", seed: int = 1) -> Tensor:
    return make_input(m, K, dtype=torch.float16, device=device, seed=seed)


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {layer.name: layer.reason for layer in fuse(model, **options).skipped}


def fused_names(model: nn.Module, **options: Any) -> list[tuple[str, ...]]:
    return [layers.names for layers in fuse(model, **options).fused]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# What is computed


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
    reference.assert_close(torch.cat(outputs, -1), x, weight, bias)
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
    reference.assert_close(y, x, weight, bias, sparse=True)
    assert isinstance(FusedLinear(layers).packed, MarlinLinear24)


def sparse_layer(n: int, k: int, seed: int, **options: Any) -> MarlinLinear24:
    return make_layer_24(n, k, **options)


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


# Never a stale result


def assert_slots_are_empty(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedLinear):
            assert not module._slot.open
            assert module._slot.input is None
            assert module._slot.parts == {}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_one_gemm_in_each_mode(mode: Any) -> None:
    model, plain = fused_and_plain(Block())
    with mode(), CountGemms() as gemms:
        y = model(inputs())
    assert gemms.count == 3
    assert torch.equal(y, plain(inputs()))
    assert_slots_are_empty(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
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


class Writes(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x)
        x.mul_(2)
        return q, self.wk(x), self.wv(x)


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


# Gradients, compilers, graphs


def gradient(model: Callable[[Tensor], Any], device: str = "cpu") -> Tensor:
    x = inputs(device=device).requires_grad_()
    y = model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    weights = range(1, len(outputs) + 1)
    sum(w * y.float().sum() for w, y in zip(weights, outputs, strict=True)).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("make", [Attention, Block])  # the latter writes an output in place
def test_gradient(make: type[nn.Module], device: str) -> None:
    model, plain = fused_and_plain(make().to(device))
    want = gradient(plain, device)
    near = {"rtol": 4e-3, "atol": 4e-3 * float(want.abs().max())}
    torch.testing.assert_close(gradient(model, device), want, **near)
    for reentrant in (True, False):
        again = gradient(lambda x: checkpoint(model, x, use_reentrant=reentrant), device)  # noqa: B023
        torch.testing.assert_close(again, want, **near)


def compiled_with_count(model: nn.Module, backend: str) -> tuple[Any, list[int]]:
    """The model under torch.compile, and the GEMMs in each graph that is made."""
    counts: list[int] = []
    compile_graph = torch._dynamo.lookup_backend(backend)

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        counts.append(sum("marlin.gemm" in str(node.target) for node in graph.graph.nodes))
        return compile_graph(graph, example)

    return torch.compile(model, fullgraph=True, backend=count), counts


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend: str, mode: Any, device: str) -> None:
    torch._dynamo.reset()
    model, _ = fused_and_plain(Block().to(device))
    compiled, counts = compiled_with_count(model, backend)
    with mode():
        for seed in range(3):
            x = inputs(device=device, seed=seed)
            want = model(x)  # also between the calls: nothing is left for the graph to find
            tolerance = 4e-3 * float(want.abs().max()) if backend == "inductor" else 0
            torch.testing.assert_close(compiled(x), want, rtol=0, atol=tolerance)
    assert counts == [3]
    assert_slots_are_empty(model)


def test_compile_of_the_owner_itself() -> None:
    torch._dynamo.reset()
    model, plain = fused_and_plain(Attention())
    compiled, counts = compiled_with_count(model, "aot_eager")
    for m in (5, 5, 7, 9):  # and once with a symbolic number of rows
        assert_equal(compiled(inputs(m)), plain(inputs(m)))
    assert counts == [1, 1]


class PrintsBetween(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x)
        print(q.shape)
        return q, self.wk(x), self.wv(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile_with_a_graph_break_between_the_calls(mode: Any) -> None:
    torch._dynamo.reset()
    model, plain = fused_and_plain(PrintsBetween())
    compiled = torch.compile(model, backend="aot_eager")
    with mode():
        x = inputs()
        for _ in range(4):
            assert_equal(compiled(x), plain(x))
            x.mul_(-1)
    assert_slots_are_empty(model)


def test_compile_with_gradient() -> None:
    torch._dynamo.reset()
    model, _ = fused_and_plain(Block())
    compiled, counts = compiled_with_count(model, "aot_eager")
    assert torch.equal(gradient(compiled), gradient(model))
    assert counts == [3]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model, _ = fused_and_plain(Attention(bias=True, perm=True, zeros=True))
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    exported = torch.export.export(model, (inputs(),), dynamic_shapes=(rows,), strict=strict)
    assert sum("gemm" in str(node.target) for node in exported.graph.nodes) == 1
    for m in (5, 1, 33):
        assert_equal(exported.module()(inputs(m)), model(inputs(m)))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 200])
def test_cuda_graph(m: int) -> None:
    model, _ = fused_and_plain(Block().cuda())
    x = inputs(m, "cuda")
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), CountGemms() as gemms:
            y = model(x)
        assert gemms.count == 3
        for seed in range(3):
            x.copy_(inputs(m, "cuda", seed))
            graph.replay()
            assert torch.equal(y, model(x))


# State


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
        assert tensor.is_contiguous(), name


@pytest.mark.parametrize("make", [make_layer, sparse_layer])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict(make: Any, options: dict[str, bool]) -> None:
    if make is sparse_layer and "perm" in options:
        return
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


# What is fused, and what is not


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


# transformers, and checkpoints

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = torch.arange(7, 39).view(2, 16)


def tiny(architecture: str, **replace: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SIZES)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).half().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    replace_linear(model, group_size=64, **replace)
    return model


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2"])
def test_transformers(architecture: str, device: str) -> None:
    model, plain = fused_and_plain(tiny(architecture).to(device))
    tokens = TOKENS.to(device)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            q, k, v = module.fused_q_proj_k_proj_v_proj.sizes
            assert q == 2 * k == 2 * v
            assert (module.q_proj.bias is not None) == (architecture == "Qwen2")
    assert_equal_states(model, plain)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            with CountGemms() as gemms:
                got = model(tokens).logits
            want = plain(tokens).logits
        assert gemms.count == 8  # qkv, o, gate and up, down: of two layers
        tolerance = 0 if device == "cpu" else 4e-3 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    assert_slots_are_empty(model)


def test_transformers_generate() -> None:
    model, plain = fused_and_plain(tiny("Llama"))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transformers_compile(architecture: str, mode: Any) -> None:
    torch._dynamo.reset()
    model, _ = fused_and_plain(tiny(architecture))
    compiled, counts = compiled_with_count(model, "aot_eager")
    with mode():
        for _ in range(2):
            got = compiled(TOKENS, use_cache=False).logits
            assert torch.equal(got, model(TOKENS, use_cache=False).logits)
    assert counts == [8]


def test_transformers_sparse_and_asymmetric() -> None:
    for options in ({"symmetric": False}, {"sparse": True, "prune": "magnitude"}):
        model, plain = fused_and_plain(tiny("Llama", **options))
        with torch.no_grad(), CountGemms() as gemms:
            got = model(TOKENS).logits
        assert gemms.count == 8
        assert torch.equal(got, plain(TOKENS).logits)


def test_save_pretrained(tmp_path: Any) -> None:
    """A fused model is written as the checkpoint that it was read from."""
    converted = pytest.importorskip("test_transformers")
    source = converted.write_llama(tmp_path / "dst")
    model = converted.load(source.directory)
    report = fuse(model)
    assert [len(layers.names) for layers in report.fused] == [2, 2, 2, 2]
    model.save_pretrained(tmp_path / "again")
    plain = converted.load(source.directory)
    assert_equal_states(converted.load(tmp_path / "again"), plain)
    for file in ("model.safetensors",):
        one, other = (
            safetensors.torch.load_file(directory / file)
            for directory in (source.directory, tmp_path / "again")
        )
        assert one.keys() == other.keys()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_load_with_fuse(tmp_path: Any) -> None:
    import marlin

    converted = pytest.importorskip("test_transformers")
    source = converted.write_llama(tmp_path / "dst")
    settings = {k: v for k, v in source.config.items() if k != "quantization_config"}

    def empty() -> Any:
        return converted.LlamaForCausalLM(converted.LlamaConfig(**settings)).eval()

    plain = marlin.load(empty(), source.directory)
    model = marlin.load(empty(), source.directory, fuse=True)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 4
    assert_equal_states(model, plain)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    with pytest.raises(marlin.CheckpointError, match="q_proj"):  # into a fused model
        marlin.load(model, source.directory)
