"""What is read in the source of a forward: which layers are called on one input, unwritten."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marlin._call_runs import CallRun, call_runs

# Functions of this file are read, not run.
CHILDREN = ("q", "k", "v", "gate", "up")
FREE: Any = None


def runs(forward: Any) -> list[CallRun]:
    return call_runs(forward, CHILDREN, CHILDREN)


def attention(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """As transformers writes it."""
    shape = (*x.shape[:-1], -1, self.head_dim)
    q = self.q(x).view(shape).transpose(1, 2)
    k = self.k_norm(self.k(x).view(*shape)).transpose(1, 2)
    v = self.v(x).view(x.shape[0], x.size(1), -1) * self.scaling
    q, k = FREE(q, k, mask)
    return self.o(FREE(q, k, v))


def mlp(self: Any, x: Tensor) -> Tensor:
    return self.down(self.act(self.gate(x)) * self.up(x))


def own_mlp(self: Any, x: Tensor) -> Tensor:
    x = F.silu(self.gate(x)) * self.up(x)
    return self.down(x)


def gated(self: Any, x: Tensor) -> Tensor:
    """As Qwen3-Next: statements between the calls that look at results only."""
    q, gate = torch.chunk(self.q(x).view(*x.shape[:-1], -1, 2 * self.head_dim), 2, dim=-1)
    gate = gate.reshape(*x.shape[:-1], -1)
    q = self.q_norm(q)
    k: Tensor = self.k(x)
    return FREE(q, k) * gate


def in_a_branch(self: Any, x: Tensor) -> Tensor:
    if self.training:
        for _ in range(2):
            q = self.q(x)
            k = self.k(x)
        return q + k
    return x


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (attention, ("q", "k", "v")),
        (mlp, ("gate", "up")),
        (own_mlp, ("gate", "up")),
        (gated, ("q", "k")),
        (in_a_branch, ("q", "k")),
    ],
)
def test_one_input(forward: Any, names: tuple[str, ...]) -> None:
    assert runs(forward) == [CallRun(names, "")]


def cross_attention(self: Any, x: Tensor, other: Tensor) -> Tensor:
    q = self.q(x)
    k, v = self.k(other), self.v(other)
    return FREE(q, k, v)


def both(self: Any, x: Tensor) -> Tensor:
    a = FREE(self.q(x), self.k(x), self.v(x))
    return self.gate(a) * self.up(a)


def test_each_input_has_a_run() -> None:
    assert runs(cross_attention) == [CallRun(("k", "v"), "")]
    assert runs(both) == [CallRun(("q", "k", "v"), ""), CallRun(("gate", "up"), "")]


def test_other_children() -> None:
    """Between the calls they may be called if they are known to be harmless."""
    assert call_runs(attention, ("q", "v"), CHILDREN) == [CallRun(("q", "v"), "")]
    first, second = call_runs(attention, ("q", "v"), ("q", "v"))
    assert (first.names, second.names) == (("q",), ("v",))
    assert "gives x to self.k_norm, which may write it" in first.problem  # it is not seen as new


def chain(self: Any, x: Tensor) -> Tensor:
    x = self.q(x)
    x += 1
    x = self.k(x)
    if self.training:
        x = x * 2
    return self.v(x)


def other_arguments(self: Any, x: Tensor) -> Tensor:
    q = self.q(x + 1)
    k = self.k(x + 1)
    v = self.v(input=x)
    return q + k + v + self.other.gate(x) + self.other.up(x)


def never(self: Any, *layers: Any) -> None:
    for layer in layers:
        layer(self)


def test_no_run() -> None:
    for forward in (chain, other_arguments, never):
        assert runs(forward) == []


def written(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    x.mul_(2)
    return q + self.k(x)


def augmented(self: Any, x: Tensor, y: Tensor) -> Tensor:
    q = self.q(x)
    y += 1
    return q + self.k(x)


def element(self: Any, x: Tensor, y: Tensor) -> Tensor:
    q = self.q(x)
    y[0] = 1
    return q + self.k(x)


def attribute(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    self.last = q
    return q + self.k(x)


def data(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    x.data = q
    return q + self.k(x)


def alias_written(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    q = self.q(x)
    residual.add_(q)
    return q + self.k(x)


def alias_given_away(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    q = FREE(self.q(x), residual)
    return q + self.k(x)


def alias_renamed(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    q = self.q(x)
    other = residual.view(-1)
    self.norm(other)
    return q + self.k(x)


def out_argument(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    q = torch.add(self.q(x), 1, out=residual)
    return q + self.k(x)


def in_place_option(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    q = self.q(x) + F.relu(residual, inplace=True)
    return q + self.k(x)


def any_options(self: Any, x: Tensor, **options: Any) -> Tensor:
    q = self.norm(self.q(x), **options)
    return q + self.k(x)


def looked_at(self: Any, x: Tensor) -> Tensor:
    q = self.q(x) + self.norm(x)
    return q + self.k(x)


def kept(self: Any, x: Tensor) -> Tensor:
    self.state.copy_(x)
    h = self.state
    q = self.q(h)
    self.bump()
    return q + self.k(h)


def kept_in_part(self: Any, x: Tensor) -> Tensor:
    states = self.states
    for h in states[1:]:
        y = h.view(-1, 8) if self.training else x
        q = self.q(y)
        FREE()
        k = self.k(y)
    return q + k


def left_with_self(self: Any, x: Tensor) -> Tensor:
    self.state = x.view(-1)
    q = self.q(x)
    FREE(self.state)
    return q + self.k(x)


def added(self: Any, x: Tensor) -> Tensor:
    q = self.q(x) + x
    return q + self.k(x)


def branch(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    if self.training:
        q = q + 1
    return q + self.k(x)


def condition(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    k = self.k(x) if self.training else q
    return q + k


def lazy(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    later = lambda: self.v_norm(q)  # noqa: E731
    return self.k(x) + later()


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (written, "calls x.mul_"),
        (augmented, "a statement of kind AugAssign"),
        (element, "assigns to y[0]"),
        (attribute, "assigns to self.last"),
        (data, "x.data"),
        (alias_written, "calls residual.add_"),
        (alias_given_away, "gives residual to FREE"),
        (alias_renamed, "gives other to self.norm"),
        (out_argument, "calls torch.add"),
        (in_place_option, "calls F.relu"),
        (any_options, "calls self.norm"),
        (added, "uses x"),
        (looked_at, "gives x to self.norm"),
        (branch, "a statement of kind If"),
        (condition, "only if a condition holds"),
        (lazy, "Lambda"),
    ],
)
def test_problem(forward: Any, problem: str) -> None:
    found = runs(forward)
    assert [run.names for run in found] == [("q",), ("k",)]
    for run in found:
        assert problem in run.problem, run.problem
        assert run.problem.endswith("between the calls on x")


@pytest.mark.parametrize(
    ("forward", "name"), [(kept, "h"), (kept_in_part, "y"), (left_with_self, "x")]
)
def test_inputs_that_the_module_keeps(forward: Any, name: str) -> None:
    """Which any method, and any function, could write."""
    found = runs(forward)
    assert [run.names for run in found] == [("q",), ("k",)]
    assert found[1].problem == f"forward calls it on {name}, which may be a tensor that self keeps"


def late_gate(self: Any, x: Tensor, cos: Tensor) -> Tensor:
    q, k, v = self.q(x), self.k(x), self.v(x)
    q = FREE(q, cos)
    return FREE(q, k, v) * self.gate(x)


def two_pairs(self: Any, x: Tensor) -> Tensor:
    a = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)
    if self.training:
        a = a * 2
    return a + self.gate(x) * self.up(x)


def two_places(self: Any, x: Tensor) -> Tensor:
    if self.training:
        return self.q(x) + self.gate(x) + self.up(x)
    return self.q(x)


def test_runs_are_as_long_as_can_be() -> None:
    assert [run.names for run in runs(late_gate)] == [("q", "k", "v"), ("gate",)]
    assert "gives cos to FREE" in runs(late_gate)[1].problem
    assert runs(two_pairs) == [CallRun(("q", "k", "v"), ""), CallRun(("gate", "up"), "")]
    assert runs(two_places) == [
        CallRun(("q",), "it is called in 2 places of the source"),
        CallRun(("gate", "up"), ""),
    ]


def test_other_methods() -> None:
    assert call_runs(mlp, CHILDREN, CHILDREN, [attention, cross_attention]) == runs(mlp)
    first, second = call_runs(attention, CHILDREN, CHILDREN, [written])
    assert (first.names, first.problem) == (("q",), "it is called in 2 places of the source")
    assert (second.names, second.problem) == (("k",), first.problem)
    unreadable = [lambda self, x: self.gate(x), lambda self, x: x]
    assert call_runs(mlp, CHILDREN, CHILDREN, unreadable[1:]) == runs(mlp)
    assert [run.names for run in call_runs(mlp, CHILDREN, CHILDREN, unreadable)] == [("gate",)]


def test_decorated() -> None:
    @functools.wraps(attention)
    def wrapper(*args: Any) -> Tensor:
        return attention(*args)

    assert runs(wrapper) == runs(attention)


def test_source_that_cannot_be_read() -> None:
    namespace: dict[str, Any] = {}
    exec("def forward(self, x): return self.q(x) + self.k(x)", namespace)
    for forward in (namespace["forward"], len, torch.add, lambda self, x: self.q(x) + self.k(x)):
        with pytest.raises(OSError, match="the source of forward"):
            runs(forward)
