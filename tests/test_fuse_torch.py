"""Fused layers under autograd, in compiled graphs and in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusable import (
    MODES,
    Attention,
    Block,
    CountGemms,
    assert_equal,
    assert_slots_are_empty,
    compiled_with_count,
    fused_and_plain,
    gradient,
    inputs,
)
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("make", [Attention, Block])  # the latter writes an output in place
def test_gradient(make: type[nn.Module], device: str) -> None:
    model, plain = fused_and_plain(make().to(device))
    want = gradient(plain, device)
    near = {"rtol": 4e-3, "atol": 4e-3 * float(want.abs().max())}
    torch.testing.assert_close(gradient(model, device), want, **near)
    for reentrant in (True, False):
        again = gradient(lambda x: checkpoint(model, x, use_reentrant=reentrant), device)  # noqa: B023
        torch.testing.assert_close(again, want, **near)


@pytest.mark.parametrize("mode", MODES)
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


def compile_owner() -> list[int]:
    torch._dynamo.reset()
    model, plain = fused_and_plain(Attention())
    compiled, counts = compiled_with_count(model, "aot_eager")
    for m in (5, 5, 7, 9):  # and once with a symbolic number of rows
        assert_equal(compiled(inputs(m)), plain(inputs(m)))
    return counts


def test_compile_of_the_owner_itself() -> None:
    assert len(compile_owner()) == 2


@pytest.mark.xfail(
    TorchVersion(torch.__version__) >= "2.15",
    reason="with fullgraph=True the hooks of the module that is compiled are not in its graph, so "
    "each part computes the whole: right, and three times the work",
    strict=True,
)
def test_compile_of_the_owner_itself_runs_one_gemm() -> None:
    assert compile_owner() == [1, 1]


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
