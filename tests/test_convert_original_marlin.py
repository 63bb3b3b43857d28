"""Whole checkpoints of the original Marlin kernel's packing, however their settings call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    Source,
    assert_holds,
    gptq_tensors,
    make_layer,
    read_all,
    write_checkpoint,
)
from conversions import assert_change_is_found, assert_loads, convert_exactly, model_of
from memory import grown
from test_formats_original_marlin import write
from torch import Tensor

from marlin import load
from marlin.cli import main
from marlin.convert import convert
from marlin.export import export
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

UP, DOWN = "model.layers.0.up", "model.layers.0.down"

STYLES: dict[str, dict[str, Any]] = {
    "own": {"quant_method": "marlin"},
    "autogptq 0.7": {"quant_method": "gptq", "is_marlin_format": True},
    "autogptq 0.8": {"quant_method": "gptq", "checkpoint_format": "marlin"},
    "both": {"quant_method": "gptq", "checkpoint_format": "marlin", "is_marlin_format": False},
    "alias": {"format": "marlin"},
}


def marlin_tensors(layer: GptqLayer) -> dict[str, Tensor]:
    stored = write(layer.q, layer.scales)
    return stored if layer.bias is None else {**stored, "bias": layer.bias}


def marlin_config(
    group_size: int | None = 128, style: str = "autogptq 0.8", **changes: Any
) -> dict[str, Any]:
    """A ``config.json``, changed as by :func:`tiles_config`."""
    return tiles_config(group_size, **STYLES[style] | changes)


def tiles_config(group_size: int | None, **changes: Any) -> dict[str, Any]:
    """A ``config.json``; ``changes`` go to its quantization_config, None removes a key."""
    settings = {"bits": 4, "sym": True, "desc_act": False, "group_size": group_size, **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    return {"model_type": "tiny", "hidden_size": 64, "quantization_config": settings}


def default_layers() -> dict[str, GptqLayer]:
    return {
        UP: make_layer(384, 64, 128, seed=1),
        DOWN: make_layer(128, 128, 128, bias=True, seed=2),  # one group: another order of scales
    }


def write_marlin(directory: Path, **options: Any) -> Source:
    options = {"config": marlin_config(), **options}
    return write_checkpoint(directory, default_layers(), tensors_of=marlin_tensors, **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_every_variant_is_exact(
    tmp_path: Path, group_size: int, dtype: torch.dtype, shards: int
) -> None:
    layers = {
        "a.b": make_layer(384, 64, group_size, bias=True, dtype=dtype, seed=1),
        "a.c": make_layer(16, 192, group_size, dtype=dtype, seed=2),
    }
    source = write_checkpoint(
        tmp_path / "src",
        layers,
        config=marlin_config(group_size),
        tensors_of=marlin_tensors,
        shards=shards,
    )
    report = convert_exactly(tmp_path)
    assert report.source_format == "original-marlin"
    assert report.warnings == []
    assert_holds(tmp_path / "dst", source)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json", "both"])
@pytest.mark.parametrize("style", STYLES)
def test_settings(tmp_path: Path, style: str, place: str) -> None:
    source = write_marlin(tmp_path / "src", config=marlin_config(128, style))
    inner = source.config["quantization_config"]
    if place != "config.json":
        (source.directory / "quantize_config.json").write_text(json.dumps(inner))
    if place == "quantize_config.json":
        (source.directory / "config.json").write_text("{}")
    convert(source.directory, tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert not (tmp_path / "dst" / "quantize_config.json").exists()


def test_few_settings_are_enough(tmp_path: Path) -> None:
    """As the first such checkpoints had them."""
    config = {"quantization_config": {"quant_method": "marlin", "group_size": 128}}
    source = write_marlin(tmp_path / "src", config=config)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)


def test_excluded_modules_are_copied(tmp_path: Path) -> None:
    others = {"lm_head.weight": torch.randn(8, 8), "model.gate.weight": torch.randn(8, 8)}
    config = marlin_config(dynamic={r"-:.*gate": {}})
    source = write_marlin(tmp_path / "src", config=config, others=others)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)


def test_loads_into_a_model(tmp_path: Path) -> None:
    source = write_marlin(tmp_path / "src", others={})
    with pytest.raises(CheckpointError, match="not 'marlin': convert the checkpoint"):
        load(model_of(source), tmp_path / "src")
    convert_exactly(tmp_path)
    assert_loads(tmp_path, source)


def test_becomes_gptq(tmp_path: Path) -> None:
    """The way out of a packing that few tools still read."""
    source = write_marlin(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    got = read_all(tmp_path / "out")
    for name, layer in source.layers.items():
        for leaf, tensor in gptq_tensors(layer).items():
            assert torch.equal(got[f"{name}.{leaf}"], tensor)
    assert verify(tmp_path / "out", tmp_path / "src", progress=False).equal


def test_dry_run_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_marlin(tmp_path / "src")
    dry = convert(tmp_path / "src", tmp_path / "dst", progress=False, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--json"]) == 0
    wet = json.loads(capsys.readouterr().out)
    assert (wet["bytes_after"], wet["shards"]) == (dry.bytes_after, dry.shards)
    assert wet["source_format"] == "original-marlin"
    assert main(["verify", str(tmp_path / "dst"), "--against", str(tmp_path / "src")]) == 0


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        # word 21: col 1, t 1, tile 1; nibble 6: block 1, the odd column of the first pair
        ("B", lambda t: t[1, 21].bitwise_xor_(1 << 24), "weight row 25, column 19 is"),
        ("s", lambda t: t[1, 10].mul_(2), r"scales row 1 \(group\), column 17 is"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    write_marlin(tmp_path / "src")
    assert_change_is_found(tmp_path, f"{UP}.{leaf}", change, says)


def test_memory_is_bounded_by_a_layer(tmp_path: Path) -> None:
    """24 layers of 2 MB in one file: the peak grows by a few layers, not by the file."""

    def any_integers(layer: GptqLayer) -> dict[str, Tensor]:
        return {"B": gptq_tensors(layer)["qweight"].view(128, 4096), "s": layer.scales}

    layers = dict.fromkeys([f"m.{i}" for i in range(24)], make_layer(2048, 2048, 128))
    others = {"embed.weight": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}
    write_checkpoint(
        tmp_path / "src", layers, config=marlin_config(), others=others, tensors_of=any_integers
    )
    peak = grown("marlin.convert(source, target)", tmp_path / "src", tmp_path / "dst")
    assert peak < 60  # the source has at least 98 MiB
