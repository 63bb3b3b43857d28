"""Whole checkpoints of Sparse-Marlin's packing: ``B_24``, ``B_meta`` and ``s`` of every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import GptqLayer, Source, read_all, write_checkpoint
from conversions import (
    assert_change_is_found,
    assert_loads,
    convert_exactly,
)
from test_convert_marlin_24 import UP, SparseLayer, default_layers, make_sparse_layer
from test_convert_original_marlin import tiles_config
from test_formats_marlin_24 import write
from torch import Tensor

from marlin.cli import main
from marlin.convert import convert
from marlin.export import export
from marlin.verify import verify

NAMES = {"weight_packed": "B_24", "meta": "B_meta", "scale_packed": "s"}
STYLES: dict[str, dict[str, Any]] = {
    "vllm": {"quant_method": "gptq", "checkpoint_format": "marlin_24"},
    "vllm, its own name": {"quant_method": "gptq_marlin_24"},
    "short": {"quant_method": "marlin_24"},
    "tgi": {"quant_method": "marlin", "checkpoint_format": "marlin_24"},
    "both": {"quant_method": "gptq_marlin_24", "checkpoint_format": "marlin_24"},
    "alias": {"format": "marlin_24"},
}


def sparse_marlin_tensors(layer: GptqLayer) -> dict[str, Tensor]:
    assert isinstance(layer, SparseLayer)
    stored = write(layer.q.long() - 8, layer.places, layer.scales)
    tensors = {NAMES[name]: tensor for name, tensor in stored.items()}
    return tensors if layer.bias is None else {**tensors, "bias": layer.bias}


def sparse_marlin_config(
    group_size: int | None = 128, style: str = "vllm", **changes: Any
) -> dict[str, Any]:
    """A ``config.json``, changed as by :func:`tiles_config`."""
    return tiles_config(group_size, **STYLES[style] | changes)


def write_sparse_marlin(directory: Path, **options: Any) -> Source:
    options = {"config": sparse_marlin_config(), "layers": default_layers(), **options}
    return write_checkpoint(directory, tensors_of=sparse_marlin_tensors, **options)


def assert_holds_sparse(directory: Path, source: Source) -> None:
    """Every layer is what ``pack_24`` makes of its integers and places, bit for bit."""
    found = read_all(directory)
    modules = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"]
    assert set(modules) == set(source.layers)
    for name, layer in source.layers.items():
        assert isinstance(layer, SparseLayer)
        n, k = layer.q.shape
        stored = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter(2, layer.places, True)
        qweight, places = torch.ops.marlin.pack_24(layer.q, stored.view(n, k))
        want = {"qweight": qweight, "places": places, "scales": layer.scales}
        if layer.bias is not None:
            want["bias"] = layer.bias
        for leaf, tensor in want.items():
            got = found.pop(f"{name}.{leaf}")
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor), (name, leaf)
        assert modules[name] == {
            "in_features": k, "out_features": n, "group_size": layer.group_size, "sparsity": "2:4",
        }  # fmt: skip
    assert found.keys() == source.others.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.others.items())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_every_variant_is_exact(tmp_path: Path, group_size: int, shards: int) -> None:
    layers = {
        "a.b": make_sparse_layer(64, 384, group_size, bias=True, seed=1),
        "a.c": make_sparse_layer(128, 32, group_size, seed=2),
        # Two groups, whose order compressed-tensors leaves open.
        "a.d": make_sparse_layer(64, 256, group_size, seed=3),
    }
    config = sparse_marlin_config(group_size)
    source = write_sparse_marlin(tmp_path / "src", layers=layers, config=config, shards=shards)
    report = convert_exactly(tmp_path)
    assert report.source_format == "sparse-marlin"
    assert [(layer.sparse, layer.dense_reason) for layer in report.layers] == [(True, "")] * 3
    assert not report.warnings
    assert_holds_sparse(tmp_path / "dst", source)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json", "both"])
@pytest.mark.parametrize("style", STYLES)
def test_settings(tmp_path: Path, style: str, place: str) -> None:
    source = write_sparse_marlin(tmp_path / "src", config=sparse_marlin_config(128, style))
    if place != "config.json":
        inner = json.dumps(source.config["quantization_config"])
        (source.directory / "quantize_config.json").write_text(inner)
    if place == "quantize_config.json":
        (source.directory / "config.json").write_text("{}")
    convert_exactly(tmp_path)
    assert_holds_sparse(tmp_path / "dst", source)


def test_loads_into_a_model(tmp_path: Path) -> None:
    source = write_sparse_marlin(tmp_path / "src", others={})
    convert_exactly(tmp_path)
    assert_loads(tmp_path, source)


def test_becomes_gptq(tmp_path: Path) -> None:
    """The way out of a packing that no tool reads any more."""
    write_sparse_marlin(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert verify(tmp_path / "out", tmp_path / "src", progress=False).equal


def test_dry_run_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse_marlin(tmp_path / "src")
    command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst")]
    assert main([*command, "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert (dry["source_format"], len(dry["layers"])) == ("sparse-marlin", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert main(command) == 0
    assert "2:4 sparse: 2 of 2 layers\n" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "dst"), "--against", str(tmp_path / "src")]) == 0


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("B_24", lambda t: t[0, 0].bitwise_xor_(1), r"weight row 0, column \d is"),
        ("s", lambda t: t[1, 1].mul_(2), r"scales row 1 \(group\), column 4 is"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    write_sparse_marlin(tmp_path / "src")
    assert_change_is_found(tmp_path, f"{UP}.{leaf}", change, says)
