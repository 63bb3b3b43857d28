"""A whole model of packed layers inside torch: compiled, exported, built ahead of time, captured.

The layers are those of the demo's GPTQ checkpoint with act-order, and the same model's pruned to
2:4.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marlin

pytest.importorskip("transformers", minversion="5.0")
integration = import_module("marlin.integrations.transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

DEMO = Path(__file__).parent / "data" / "demo"
BATCH, LENGTH = 2, 16
VOCABULARY = 1024


class Decoder(nn.Module):
    """Tokens [batch, LENGTH] -> logits, with all that a forward needs besides made beforehand.

    transformers makes the mask with a look at the values of positions, which no graph can hold.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        mask = torch.full((LENGTH, LENGTH), torch.finfo(model.dtype).min, dtype=model.dtype)
        self.register_buffer("mask", mask.triu(1)[None, None])
        self.register_buffer("positions", torch.arange(LENGTH)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(
            tokens, attention_mask=self.mask, position_ids=self.positions, use_cache=False
        ).logits
        return logits


def load(sparse: bool) -> Any:
    if not sparse:
        with integration.repacking():
            return AutoModelForCausalLM.from_pretrained(DEMO / "gptq-g64-actorder")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "fp16", dtype=torch.float16)
    marlin.replace_linear(model, sparse=True, prune="magnitude")
    return model


@pytest.fixture(params=[False, True], ids=["dense", "2:4"])
def model(request: pytest.FixtureRequest, device: str) -> Decoder:
    """The first two layers, for time."""
    whole = load(request.param)
    whole.model.layers = whole.model.layers[:2]
    torch._dynamo.reset()
    return Decoder(whole).requires_grad_(False).to(device).eval()


def tokens(seed: int, device: str, batch: int = BATCH) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, LENGTH), generator=random).to(device)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Other kernels around ours round fp16 at other places."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_compile(model: Decoder, device: str) -> None:
    # On the CPU inductor's code generator would take most of the time: test_ahead_of_time has it.
    options = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(model, fullgraph=True, **options)
    for seed in range(4):  # reduce-overhead warms up, records a graph, replays it
        x = tokens(seed, device)
        assert_close(compiled(x).clone(), model(x))


def test_export(model: Decoder, device: str) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (tokens(0, device),), dynamic_shapes=({0: batch},))
    called = [str(node.target) for node in exported.graph.nodes if "marlin" in str(node.target)]
    assert len(called) == 2 * 7
    for size in (2, 1, 5):
        x = tokens(size, device, size)
        assert torch.equal(exported.module()(x), model(x))


# Importing marlin is all that a process needs: the package calls the ops by name.
RUN_PACKAGE = """
import sys, torch, marlin
package, inputs, outputs = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save([run(x) for x in torch.load(inputs)], outputs)
"""


def build_package(model: nn.Module, x: Tensor, path: Path) -> str:
    quickly = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp_cache_precompile_headers": False,
    }
    return torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(path), inductor_configs=quickly
    )


def run_package(package: str, inputs: list[Tensor], folder: Path) -> list[Tensor] | None:
    """What it gives in a process of its own; None where a signal ends that."""
    torch.save(inputs, folder / "inputs.pt")
    arguments = [package, str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    run = subprocess.run(
        [sys.executable, "-c", RUN_PACKAGE, *arguments], capture_output=True, text=True
    )
    if run.returncode < 0:
        return None
    assert run.returncode == 0, run.stderr
    return list(torch.load(folder / "outputs.pt"))


def test_ahead_of_time(model: Decoder, device: str, tmp_path: Path) -> None:
    model.model.model.layers = model.model.model.layers[:1]
    inputs = [tokens(seed, device) for seed in range(2)]
    package = build_package(model, inputs[0], tmp_path / "model.pt2")
    outputs = run_package(package, inputs, tmp_path)
    if outputs is None:  # torch 2.11.0 crashed on one machine with any package for CUDA
        x = torch.randn(2, 64, device=device)
        plain = build_package(nn.Linear(64, 64).to(device), x, tmp_path / "plain.pt2")
        assert run_package(plain, [x], tmp_path) is None, "crashed, unlike a plain layer's package"
        pytest.skip(f"torch {torch.__version__} crashes here with a plain layer's package, too")
    for x, y in zip(inputs, outputs, strict=True):
        assert_close(y, model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_graph(model: Decoder, device: str) -> None:
    x = tokens(0, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries and kernels are loaded
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(x)
    for seed in range(4):
        x.copy_(tokens(seed, device))
        graph.replay()
        assert torch.equal(logits, model(x))
