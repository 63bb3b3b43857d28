"""Whole checkpoints of compressed-tensors' ``marlin-24``: their layers are 2:4 sparse as stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    Source,
    ct_config,
    ct_tensors,
    make_layer,
    read_all,
    write_checkpoint,
)
from conversions import assert_change_is_found, assert_loads, convert_exactly
from test_convert_24 import stored_weight
from test_formats_marlin_24 import make_weight, write
from torch import Tensor

from marlin.cli import main
from marlin.convert import convert

UP, DOWN = "model.layers.0.up", "model.layers.0.down"


class SparseLayer(GptqLayer):
    """A 2:4 layer that knows which two of every four weights its file stores."""

    places: Tensor


def make_sparse_layer(
    n: int, k: int, group_size: int, *, bias: bool = False, seed: int = 0
) -> SparseLayer:
    """Of the weights that are stored, some are zero."""
    rest = make_layer(k, n, group_size, bias=bias, seed=seed)
    weight, places = make_weight(n, k, seed)
    q = (weight + 8).to(torch.uint8)
    layer = SparseLayer(q, rest.zeros, rest.scales, rest.g_idx, group_size, rest.bias)
    layer.places = places
    return layer


def sparse_tensors(layer: GptqLayer) -> dict[str, Tensor]:
    assert isinstance(layer, SparseLayer)
    stored = write(layer.q.long() - 8, layer.places, layer.scales)
    return stored if layer.bias is None else {**stored, "bias": layer.bias}


def default_layers() -> dict[str, SparseLayer]:
    return {
        UP: make_sparse_layer(64, 384, 128, seed=1),
        DOWN: make_sparse_layer(128, 96, 128, bias=True, seed=2),  # one group, as 96 < 128
    }


def config_24(group_size: int = 128, **changes: Any) -> dict[str, Any]:
    return ct_config(group_size, **{"format": "marlin-24", **changes})


def write_sparse(directory: Path, **options: Any) -> Source:
    return write_checkpoint(
        directory, default_layers(), config=config_24(), tensors_of=sparse_tensors, **options
    )


@pytest.mark.parametrize("flags", [{}, {"sparse": True}, {"require_sparse": True}], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_every_variant_is_exact(
    tmp_path: Path, group_size: int, shards: int, flags: dict[str, bool]
) -> None:
    layers = {
        "a.b": make_sparse_layer(64, 384, group_size, bias=True, seed=1),
        "a.c": make_sparse_layer(128, 32, group_size, seed=2),
    }
    source = write_checkpoint(
        tmp_path / "src",
        layers,
        config=config_24(group_size),
        tensors_of=sparse_tensors,
        shards=shards,
    )
    report = convert_exactly(tmp_path, **flags)
    assert [(layer.sparse, layer.dense_reason) for layer in report.layers] == [(True, "")] * 2
    assert not report.warnings
    found = read_all(tmp_path / "dst")
    for name, layer in layers.items():
        assert torch.equal(stored_weight(found, name, layer), layer.weight())
    assert all(torch.equal(found[name], want) for name, want in source.others.items())
    quantization = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == 2
    assert quantization["modules"]["a.b"] == {
        "in_features": 384, "out_features": 64, "group_size": group_size, "sparsity": "2:4",
    }  # fmt: skip


@pytest.mark.parametrize("mixed", [True, False])
def test_loads_beside_dense_layers(tmp_path: Path, mixed: bool) -> None:
    """One group of the checkpoint is 2:4, the other dense: outputs are those in fp32."""
    layers: dict[str, GptqLayer] = {**default_layers(), "model.dense": make_layer(64, 64, 32)}
    config = ct_config(32, targets=["model.dense"])
    settings = config["quantization_config"]
    sparse = copy.deepcopy(settings["config_groups"]["group_0"])
    sparse |= {"targets": ["Linear"], "format": "marlin-24"}
    sparse["weights"]["group_size"] = 128
    settings["config_groups"]["group_1"] = sparse
    if mixed:
        settings["format"] = "mixed-precision"
        settings["config_groups"]["group_0"]["format"] = "pack-quantized"

    def make(layer: GptqLayer) -> dict[str, Tensor]:
        is_sparse = isinstance(layer, SparseLayer)
        return sparse_tensors(layer) if is_sparse else ct_tensors(layer, zeros="none")

    source = write_checkpoint(tmp_path / "src", layers, config=config, others={}, tensors_of=make)
    report = convert_exactly(tmp_path)
    assert {r.name for r in report.layers if r.sparse} == {UP, DOWN}
    assert_loads(tmp_path, source)


def test_dry_run_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path / "src")
    dry = convert(tmp_path / "src", tmp_path / "dst", progress=False, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    wet = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert (dry.layers, dry.bytes_after, dry.shards) == (wet.layers, wet.bytes_after, wet.shards)
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "again")]) == 0
    assert "2:4 sparse: 2 of 2 layers\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("weight_packed", lambda t: t[0, 0].bitwise_xor_(1), r"weight row 0, column \d is"),
        ("scale_packed", lambda t: t[1, 1].mul_(2), r"scales row 1 \(group\), column 4 is"),
        ("meta", lambda t: t[0, 0].bitwise_xor_(int(t[0, 0]) & 15 ^ 0b1110), r"weight row 0, col"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    write_sparse(tmp_path / "src")
    if leaf == "meta":  # a quad that does not have the places 2, 3 already
        assert int(read_all(tmp_path / "src")[f"{UP}.meta"][0, 0]) & 15 != 0b1110
    assert_change_is_found(tmp_path, f"{UP}.{leaf}", change, says)
