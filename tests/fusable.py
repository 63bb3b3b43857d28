"""Modules with layers to fuse, and what the tests of fuse ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from layers import make_layer, make_layer_24
from operands import make_input
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from marlin import FusedLinear, MarlinLinear24, fuse

K = 256
OPTIONS = [{}, {"bias": True}, {"zeros": True}, {"perm": True, "bias": True}]
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
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


def sparse_layer(n: int, k: int, seed: int, **options: Any) -> MarlinLinear24:
    return make_layer_24(n, k, **options)


class Writes(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x)
        x.mul_(2)
        return q, self.wk(x), self.wv(x)


def assert_slots_are_empty(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedLinear):
            assert not module._slot.open
            assert module._slot.input is None
            assert module._slot.parts == {}


def gradient(model: Callable[[Tensor], Any], device: str = "cpu") -> Tensor:
    x = inputs(device=device).requires_grad_()
    y = model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    weights = range(1, len(outputs) + 1)
    sum(w * y.float().sum() for w, y in zip(weights, outputs, strict=True)).backward()
    assert x.grad is not None
    return x.grad


def compiled_with_count(model: nn.Module, backend: str) -> tuple[Any, list[int]]:
    """The model under torch.compile, and the GEMMs in each graph that is made."""
    counts: list[int] = []
    compile_graph = torch._dynamo.lookup_backend(backend)

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        counts.append(sum("marlin.gemm" in str(node.target) for node in graph.graph.nodes))
        return compile_graph(graph, example)

    return torch.compile(model, fullgraph=True, backend=count), counts


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
        assert tensor.is_contiguous(), name
