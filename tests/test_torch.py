"""The ops inside torch: opcheck, compile, export, CUDA graphs, streams, devices."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reference
import torch
from operands import ALL_OPTIONS, Maker, Weight24, make_input, make_weight, make_weight_24
from torch import Tensor

from marlin import _inspect

ops = torch.ops.marlin
N, K = 136, 264
both_kinds = pytest.mark.parametrize("make", [make_weight, make_weight_24], ids=["dense", "2:4"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "all-options"])
@both_kinds
def test_opcheck_gemm(device: str, make: Maker, dtype: torch.dtype, full: bool) -> None:
    options = ALL_OPTIONS[make] if full else {}
    w = make(N, K, 64, dtype=dtype, device=device, **options)
    op = ops.gemm if make is make_weight else ops.gemm_24
    x = make_input(6, K, dtype=dtype, device=device).view(2, 3, K)
    torch.library.opcheck(op.default, (x, *w.tensors))
    torch.library.opcheck(op.default, (x, *w.tensors), {"static_weights": True})
    torch.library.opcheck(op.default, (x.detach().requires_grad_(), *w.tensors))


def test_opcheck_packing(device: str) -> None:
    w = make_weight(N, K, 32, device=device, zeros=True, perm=True)
    gptq, awq = reference.gptq_pack(w.q).to(device), reference.awq_pack(w.q).to(device)
    for op, arguments in (
        (ops.pack, (w.q,)),
        (ops.unpack, (w.qweight, N, K)),
        (ops.repack_gptq, (gptq,)),
        (ops.repack_gptq, (gptq, w.perm)),
        (ops.repack_awq, (awq,)),
    ):
        torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(ops.dequantize.default, (w.qweight, w.scales, w.zeros, w.perm), {"k": K})


def test_opcheck_packing_24(device: str) -> None:
    q = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    mask = torch.tensor([True, False, False, True], device=device).repeat(N, K // 4)
    scales = torch.rand(-(-K // 64), N, device=device).half()
    torch.library.opcheck(ops.pack_24.default, (q, mask))
    packed = ops.pack_24(q, mask)
    torch.library.opcheck(ops.unpack_24.default, (*packed, N, K))
    torch.library.opcheck(ops.dequantize_24.default, (*packed, scales), {"k": K})


def layer(make: Maker, device: str) -> Callable[[Tensor], Tensor]:
    w = make(N, K, 64, device=device, bias=True)

    def forward(x: Tensor) -> Tensor:
        return torch.relu(w.gemm(x * 2)) + 1

    return forward


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@both_kinds
def test_compile_without_breaks_or_recompiles(device: str, make: Maker, backend: str) -> None:
    if device == "cpu" and backend == "inductor":
        backend = "aot_eager"  # inductor's CPU code generator is not what is tested here
    torch._dynamo.reset()
    forward = layer(make, device)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    counted = torch.compile(forward, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 16, 17, 64, 65, 130):
        x = make_input(m, K, dtype=torch.float16, device=device, seed=m)
        torch.testing.assert_close(compiled(x), forward(x), rtol=2e-3, atol=2e-3)
        counted(x)
    assert counter.frame_count == 1


@both_kinds
def test_compile_backward(device: str, make: Maker) -> None:
    torch._dynamo.reset()
    forward = layer(make, device)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = make_input(5, K, dtype=torch.float16, device=device).requires_grad_()
    y = x.detach().clone().requires_grad_()
    forward(x).float().sum().backward()
    compiled(y).float().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


@both_kinds
def test_export(device: str, make: Maker) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = make(N, K, device=device)
            self.register_buffer("qweight", w.qweight)
            self.register_buffer("scales", w.scales)
            # Not as "meta": an exported module has an attribute of that name.
            self.register_buffer("places", w.meta if isinstance(w, Weight24) else None)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor
            if self.places is None:
                out = ops.gemm(x, self.qweight, self.scales)
            else:
                out = ops.gemm_24(x, self.qweight, self.places, self.scales)
            return out

    model, x = Model(), make_input(8, K, dtype=torch.float16, device=device)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},)).module()
    for m in (8, 1, 33):
        x = make_input(m, K, dtype=torch.float16, device=device)
        assert torch.equal(exported(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 40, 200])
@both_kinds
def test_cuda_graph(make: Maker, m: int) -> None:
    """Capture, then replay on new inputs: equal to eager, bit for bit."""
    w = make(576, 2880, 32, device="cuda", **ALL_OPTIONS[make])
    x = make_input(m, 2880, dtype=torch.float16, device="cuda")
    w.gemm(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w.gemm(w.gemm(x)[:, :1].expand(m, 2880) + x)
    for seed in range(5):
        x.copy_(make_input(m, 2880, dtype=torch.float16, device="cuda", seed=seed))
        graph.replay()
        assert torch.equal(y, w.gemm(w.gemm(x)[:, :1].expand(m, 2880) + x))


class EdgeData(ctypes.Structure):
    """cudaGraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def edges(graph: torch.cuda.CUDAGraph) -> list[EdgeData]:
    """The dependencies between the nodes of a captured graph, as the driver has them."""
    loaded = Path("/proc/self/maps").read_text().split()
    runtime = ctypes.CDLL(next(path for path in loaded if "/libcudart.so" in path))
    get = runtime.cudaGraphGetEdges if torch.version.cuda >= "13" else runtime.cudaGraphGetEdges_v2
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert get(handle, None, None, None, ctypes.byref(count)) == 0
    nodes = ctypes.c_void_p * count.value
    data = (EdgeData * count.value)()
    assert get(handle, nodes(), nodes(), data, ctypes.byref(count)) == 0
    return list(data)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 100, 300])
def test_capture_keeps_the_programmatic_edges(m: int) -> None:
    """Between two products a graph has the edge that lets the second start early (type 1)."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's kernels are launched so")
    w = [make_weight(512, 512, device="cuda", seed=seed) for seed in range(4)]
    x = make_input(m, 512, dtype=torch.float16, device="cuda")
    w[0].gemm(x)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for weight in w:
            x = ops.gemm(x, weight.qweight, weight.scales, static_weights=True)
    assert [(edge.type, edge.from_port) for edge in edges(graph)] == [(1, 1)] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("m", [3, 100, 300])
@both_kinds
def test_weights_written_just_before(make: Maker, m: int, captured: bool) -> None:
    """Each product follows a kernel that writes its weights: nothing may be read too early."""
    w = [make(4096, 4096, device="cuda", seed=seed) for seed in range(2)]
    x = make_input(m, 4096, dtype=torch.float16, device="cuda")
    expected = [weight.gemm(x) for weight in w]
    written = copy.deepcopy(w[0])

    def steps(count: int) -> list[Tensor]:
        results = []
        for i in range(count):
            for to, tensor in zip(written.tensors, w[i % 2].tensors, strict=True):
                if to is not None:
                    to.copy_(tensor)
            results.append(written.gemm(x))
            results.append(written.gemm(x, static_weights=True))
        return results

    def check(results: list[Tensor]) -> None:
        for i, y in enumerate(results):
            assert torch.equal(y, expected[i // 2 % 2]), f"product {i}"

    if not captured:
        check(steps(1000 if m == 3 else 200))
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = steps(100)
    for _ in range(20):
        for y in results:
            y.zero_()
        graph.replay()
        check(results)


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest) -> Iterator[int]:
    """As if the GPU had so many (0: as it is), so that blocks do much."""
    _inspect.force_plan(sms=request.param)
    yield request.param
    _inspect.force_plan()


@pytest.mark.gpu
@pytest.mark.parametrize("multiprocessors", [0, 3], indirect=True, ids=["all-sms", "3-sms"])
@pytest.mark.parametrize("m", [7, 100, 300, 4100])
@both_kinds
def test_chain_of_layers_equals_eager(make: Maker, m: int, multiprocessors: int) -> None:
    """64 distinct layers, each fed by the one before, in one graph with early weight reads."""
    layers = [make(1024, 1024, device="cuda", seed=seed) for seed in range(64)]
    x = make_input(m, 1024, dtype=torch.float16, device="cuda")

    def chain(static: bool) -> Tensor:
        y = x
        for w in layers:
            y = w.gemm(y, static_weights=static)
            y = y / y.abs().amax()
        return y

    eager = []
    y = x
    for w in layers:  # one at a time, nothing overlapping
        y = w.gemm(y)
        torch.cuda.synchronize()
        y = y / y.abs().amax()
        eager.append(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, eager[-1])
    assert torch.equal(chain(True), eager[-1])


@pytest.mark.gpu
@both_kinds
def test_reduce_overhead(make: Maker) -> None:
    torch._dynamo.reset()
    forward = layer(make, "cuda")
    compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    x = make_input(4, K, dtype=torch.float16, device="cuda")
    for _ in range(4):
        torch.testing.assert_close(compiled(x).clone(), forward(x), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@both_kinds
def test_four_streams_at_once(make: Maker) -> None:
    """Calls that overlap on four streams of four threads share nothing: same bits as one by one."""
    w = make(4096, 4096, device="cuda")
    inputs = [
        make_input(m, 4096, dtype=torch.float16, device="cuda", seed=m) for m in (1, 9, 20, 70)
    ]
    expected = [w.gemm(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [w.gemm(inputs[i]) for _ in range(200)]
            torch.cuda.current_stream().synchronize()
            wrong.extend(i for y in results if not torch.equal(y, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_device_that_is_not_current() -> None:
    for device in ("cuda:1", "cuda:0"):
        w = make_weight(N, K, device=device, perm=True)
        x = make_input(5, K, dtype=torch.float16, device=device)
        y = w.gemm(x)
        assert y.device == torch.device(device)
        reference.assert_close(y, x, w.dense64())
        assert torch.equal(ops.unpack(w.qweight, N, K), w.q)
        assert torch.equal(ops.pack(w.q), w.qweight)
        dense = ops.dequantize(w.qweight, w.scales, w.zeros, w.perm, k=K)
        assert torch.equal(dense, w.dense64().half())
        x.requires_grad_()
        w.gemm(x).sum().backward()
        assert x.grad is not None
        assert x.grad.device == torch.device(device)
        sparse = make_weight_24(N, K, device=device)
        reference.assert_close(sparse.gemm(x.detach()), x, sparse.dense64(), sparse=True)
    assert torch.cuda.current_device() == 0
