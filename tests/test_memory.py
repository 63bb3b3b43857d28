"""The host memory of converting and loading: a few layers, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import gptq_config, gptq_tensors, make_layer, write_checkpoint
from memory import grown

import marlin

SIZE, COUNT = 4096, 16  # layers of 8 MiB
LAYER = SIZE * SIZE / 2 / 2**20  # MiB of codes

PREPARATION = f"""
with torch.device("meta"):
    layers = [torch.nn.Linear({SIZE}, {SIZE}, bias=False) for _ in range({COUNT})]
model = torch.nn.Sequential(*layers)
torch.zeros({SIZE * SIZE // 8}, dtype=torch.int32).to(DEVICE)  # starts CUDA, and its copies
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint with zero points and act-order: of all that a layer may have."""
    layer = make_layer(SIZE, SIZE, 128, sym=False, act_order=True)
    tensors = gptq_tensors(layer)
    return write_checkpoint(
        tmp_path_factory.mktemp("large") / "src",
        {str(index): layer for index in range(COUNT)},
        config=gptq_config(128, sym=False, desc_act=True),
        others={},
        tensors_of=lambda layer: tensors,
    ).directory


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    target = source.with_name("dst")
    marlin.convert(source, target, progress=False)
    return target


def test_converting(source: Path, tmp_path: Path) -> None:
    peak = grown("marlin.convert(source, target)", source, tmp_path / "dst")
    assert peak < 6 * LAYER


def test_loading(converted: Path, device: str) -> None:
    """Onto a GPU, the host holds none of the model; onto the CPU, it holds the model once."""
    preparation = PREPARATION.replace("DEVICE", repr(device))
    peak = grown(f"marlin.load(model, source, device={device!r})", converted, Path(), preparation)
    held = COUNT * 1.1 * LAYER if device == "cpu" else 0
    assert peak < held + 6 * LAYER
    assert peak > 0.5 * held
