"""fuse in a model that is shared out among ranks: the same bits, the same names, one collective."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fusable import CountGemms, K, assert_equal_states, compiled_with_count, inputs
from layers import make_layer, make_layer_24
from ranks import Ranks
from torch import Tensor, nn

import marlin
from marlin import MarlinLinear
from marlin.parallel import Column, ColumnParallelMarlinLinear, Row, parallelize

WHOLE_BLOCKS = (384, 384, 768)  # shared out among 2 or 3 ranks
OPTIONS = [{}, {"perm": True, "bias": True}, {"zeros": True}, {"sparse": True, "bias": True}]
PLAN = {"q": Column(), "k": Column(), "v": Column(), "o": Row()}


class Projections(nn.Module):
    def __init__(
        self, sizes: tuple[int, int, int] = WHOLE_BLOCKS, sparse: bool = False, **options: Any
    ) -> None:
        super().__init__()
        make = make_layer_24 if sparse else make_layer
        self.q, self.k, self.v = (make(n, K, **options) for n in sizes)
        self.o = make_layer(K, sizes[2])
        if options.get("perm"):  # one input has one order
            for layer in (self.k, self.v):
                layer.perm.copy_(self.q.perm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.q(x), self.k(x)
        return q, k, self.o(self.v(x))


def fused_and_not(
    device: str, model: nn.Module | None = None, plan: Any = PLAN, names: Any = ("q", "k", "v")
) -> tuple[Any, Any]:
    """A model that is shared out, with its parts fused, and without."""
    parallel = parallelize(Projections() if model is None else model, plan).to(device)
    fused = copy.deepcopy(parallel)
    assert [layers.names for layers in marlin.fuse(fused).fused] == ([names] if names else [])
    return fused, parallel


def assert_alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        if a.device.type == "cpu":  # where no sum depends on other rows
            assert torch.equal(a, b)
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()


def same_results(device: str, options: dict[str, Any]) -> None:
    fused, plain = fused_and_not(device, Projections(**options))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for m in (0, 1, 5):
            with mode():
                x = inputs(5, device)[:m]
                with CountGemms() as gemms:
                    y = fused(x)
                assert gemms.count == 2
                assert_alike(y, plain(x))
    assert torch.equal(fused.k.layer.dequantize(), plain.k.layer.dequantize())


def gathered(device: str) -> None:
    plan = {"q": Column(gather_output=True), "k": Column(gather_output=True), "v": Column()}
    fused, plain = fused_and_not(device, plan=plan | {"o": Row()})
    with torch.no_grad():
        y = fused(inputs(device=device))
        assert y[0].size(-1) == WHOLE_BLOCKS[0]
        assert_alike(y, plain(inputs(device=device)))


def gradients(device: str) -> None:
    """They are added up over the ranks once, not once a layer."""
    reductions: list[Tensor] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, **options: Any) -> Any:
        reductions.append(tensor)
        return all_reduce(tensor, **options)

    found = []
    for model, expected in zip(fused_and_not(device), (1, 3), strict=True):
        x = inputs(device=device).requires_grad_()
        loss = sum((y.float() / 64).sin().sum() for y in model(x))
        reductions.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", count)
            loss.backward()
        assert len(reductions) == expected
        found.append(x.grad)
    fused, plain = found
    assert (fused - plain).float().norm() < 1e-2 * plain.float().norm()


def states(device: str) -> None:
    """Names and tensors are those of the parts alone, before, within and after."""
    fused, plain = fused_and_not(device, Projections(bias=True))
    assert_equal_states(fused, plain)
    other = parallelize(Projections(bias=True), PLAN).to(device)
    for tensor in other.state_dict().values():
        tensor.zero_()
    marlin.fuse(other)
    other.load_state_dict(plain.state_dict())
    assert_equal_states(other, plain)
    assert marlin.fuse(other).fused == []
    assert marlin.unfuse(other) == 3
    assert_equal_states(other, plain)
    assert type(other.q) is ColumnParallelMarlinLinear
    assert type(other.q.layer) is MarlinLinear
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in other.named_modules()] == [n for n, _ in plain.named_modules()]


def decides_alike(device: str) -> None:
    """What ends inside a block on one rank is fused on none: collectives would not match."""
    bounds = {2: (0, 64, 200), 3: (0, 64, 128, 200)}[dist.get_world_size()]
    plan = {"q": Column(), "k": Column(bounds=bounds), "v": Column(bounds=bounds)}
    plan["o"] = Row(bounds=bounds)
    model = parallelize(Projections((384, 200, 200)), plan).to(device)
    report = marlin.fuse(model)
    assert [layers.names for layers in report.fused] == [("q", "k")]
    (left,) = report.skipped
    sizes = ", ".join(str(stop - start) for start, stop in pairwise(bounds))
    assert left.name == "v"
    assert left.reason == (
        f"its {sizes} output features are not a multiple of 64, nor are those of k, and only the "
        "last may be so"
    )
    x = inputs(device=device).requires_grad_()
    sum(y.float().sum() for y in model(x)).backward()


def leaves(device: str) -> None:
    """Layers that are whole, of other ranks, or do more than their weight says."""
    fused, _ = fused_and_not(device, plan={"q": Column(), "o": Row()}, names=("k", "v"))
    assert type(fused.q.layer) is MarlinLinear
    others = dist.new_group()
    model = parallelize(Projections(), {"q": Column()}, others)
    parallelize(model, {"k": Column(), "v": Column(), "o": Row()})
    report = marlin.fuse(model)
    assert [layers.names for layers in report.fused] == [("k", "v")]
    assert report.skipped[0].reason == (
        "it is not shared out among the same ranks as k; "
        "it is not shared out among the same ranks as v"
    )
    model = parallelize(Projections(), PLAN)
    model.q.register_forward_hook(lambda *a: None)
    model.k.layer.register_forward_hook(lambda *a: None)
    report = marlin.fuse(model)
    assert report.fused == []
    assert [layer.name for layer in report.skipped if "it has hooks" in layer.reason] == ["q", "k"]


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class DoublesBetween(Projections):
    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        doubled = self.o(x)
        return q, self.k(x), doubled


def inputs_written(device: str) -> None:
    """What was put in place of a rank's part may do anything to its input."""
    plan = {name: Column() for name in "qkvo"}
    model = parallelize(DoublesBetween(), plan).to(device)
    model.o.layer = Doubling()
    plain = copy.deepcopy(model)
    assert marlin.fuse(model).fused == []
    with torch.no_grad():
        assert_alike(model(inputs(device=device)), plain(inputs(device=device)))


def again(device: str) -> None:
    """A second plan leaves fused parts alone, and unfuse says what it would lose."""
    fused, _ = fused_and_not(device, plan={name: Column() for name in "qkv"})
    parallelize(fused, {"*": Row()})
    assert type(fused.q) is ColumnParallelMarlinLinear
    fused.q = nn.Identity()
    with pytest.raises(ValueError, match=r"q\.layer is a NoneType now, not the FusedPart"):
        marlin.unfuse(fused)


def compiled(device: str) -> None:
    """As part of a model: see test_fuse_torch.py on the owner by itself."""
    fused, _ = fused_and_not(device)
    x = inputs(device=device)
    with torch.no_grad():
        model, counts = compiled_with_count(nn.Sequential(fused), "aot_eager")
        assert_alike(model(x), fused(x))
    assert counts == [2]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.call(same_results, options)


@pytest.mark.parametrize(
    "check", [gathered, gradients, states, decides_alike, leaves, inputs_written, again, compiled]
)
def test_fused_parts(ranks: Ranks, check: Any) -> None:
    ranks.call(check)
