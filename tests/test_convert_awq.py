"""Whole AWQ checkpoints: converted, verified, loaded, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    assert_holds,
    awq_config,
    awq_tensors,
    make_layer,
    make_sparse,
    read_all,
    write_checkpoint,
)
from conversions import assert_change_is_found, assert_logits, convert_exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert_24 import stored_weight
from torch import Tensor

from marlin.cli import main
from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify


def symmetric_tensors(layer: Any) -> dict[str, Tensor]:
    return {leaf: t for leaf, t in awq_tensors(layer).items() if leaf != "qzeros"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zeros", ["asymmetric", "symmetric", "symmetric, not stored"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_variant_is_exact(tmp_path: Path, group_size: int, zeros: str, shards: int) -> None:
    asymmetric = zeros == "asymmetric"
    layers = {
        "a.b": make_layer(256, 64, group_size, sym=not asymmetric, bias=True),
        "a.c": make_layer(203, 72, group_size, sym=not asymmetric, dtype=torch.bfloat16),
    }
    layers["a.b"].zeros[0, 3] = 0 if asymmetric else 8  # is stored as it is, not minus one
    source = write_checkpoint(
        tmp_path / "src",
        layers,
        config=awq_config(group_size, zero_point=asymmetric),
        shards=shards,
        tensors_of=symmetric_tensors if "not stored" in zeros else awq_tensors,
    )
    report = convert_exactly(tmp_path)
    assert_holds(tmp_path / "dst", source)
    assert report.source_format == "awq"
    assert [(layer.zeros, layer.act_order) for layer in report.layers] == [(asymmetric, False)] * 2


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 320),
    columns=st.integers(1, 20),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    shard_bytes=st.integers(1, 20_000),
)
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    k: int,
    columns: int,
    group_size: int,
    shard_bytes: int,
) -> None:
    root = tmp_path_factory.mktemp("any")
    layers = {"m.x": make_layer(k, 8 * columns, group_size, sym=False)}
    source = write_checkpoint(
        root / "src", layers, config=awq_config(group_size), tensors_of=awq_tensors
    )
    convert(root / "src", root / "dst", progress=False, shard_bytes=shard_bytes)
    assert_holds(root / "dst", source)
    assert verify(root / "dst", root / "src", progress=False).equal


def test_logits_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", config=awq_config(), tensors_of=awq_tensors)
    convert_exactly(tmp_path)
    assert_logits(tmp_path, source)


def test_sparse(tmp_path: Path) -> None:
    layers = {"a.b": make_sparse(200, 72, sym=False, bias=True), "a.c": make_layer(64, 64)}
    write_checkpoint(tmp_path / "src", layers, config=awq_config(), tensors_of=awq_tensors)
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert {layer.name: layer.sparse for layer in report.layers} == {"a.b": True, "a.c": False}
    got = stored_weight(read_all(tmp_path / "dst"), "a.b", layers["a.b"])
    assert torch.equal(got, layers["a.b"].weight())
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    with pytest.raises(CheckpointError, match=r"a\.c: weight: got [34] weights other than zero"):
        convert(tmp_path / "src", tmp_path / "all", progress=False, require_sparse=True)


def test_dry_run_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "src", config=awq_config(), tensors_of=awq_tensors)
    command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst")]
    assert main([*command, "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert (dry["source_format"], len(dry["layers"])) == ("awq", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert main(command) == 0
    assert main(["verify", str(tmp_path / "dst"), "--against", str(tmp_path / "src")]) == 0
    assert "holds exactly" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [True, False])
def test_settings_in_a_file_of_their_own(tmp_path: Path, inside: bool) -> None:
    """As older tools wrote them: under older names, and without the name of the method."""
    write_checkpoint(tmp_path / "src", config=awq_config(), tensors_of=awq_tensors)
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "src" / "quant_config.json").write_text(json.dumps(older))
    if not inside:
        (tmp_path / "src" / "config.json").write_text("{}")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal
    assert not (tmp_path / "dst" / "quant_config.json").exists()


@pytest.mark.parametrize("entry", ["lm_head", "gate", "block.up"])
def test_modules_not_converted(tmp_path: Path, entry: str) -> None:
    """They are copied; a word of which an entry is a part does not count, as tools differ."""
    others = {f"model.{entry}.weight": torch.randn(8, 8), f"{entry}.bias": torch.randn(8)}
    config = awq_config(modules_to_not_convert=[entry])
    layers = {"model.0.gate_proj": make_layer(64, 64)}
    source = write_checkpoint(
        tmp_path / "src", layers, config=config, others=others, tensors_of=awq_tensors
    )
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)


def test_scales_of_another_dtype(tmp_path: Path) -> None:
    layer = make_layer(64, 64, bias=True)
    layer.scales = layer.scales.float()
    write_checkpoint(tmp_path / "src", {"a.b": layer}, config=awq_config(), tensors_of=awq_tensors)
    with pytest.raises(CheckpointError, match=r"a\.b: scales: got float32.*dtype=torch\.float16"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    convert(tmp_path / "src", tmp_path / "dst", progress=False, dtype=torch.float16)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("qweight", lambda t: t.view(-1)[0].bitwise_xor_(1), r"weight row \d, column \d+ is \d+"),
        ("qzeros", lambda t: t[1, 2].bitwise_xor_(1 << 4), r"zeros row 1 \(group\), column 18 is"),
        ("scales", lambda t: t[1, 5].mul_(2), r"scales row 1 \(group\), column 5 is"),
        ("bias", lambda t: t[7].add_(1), "bias column 7 is"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    layers = {"a.b": make_layer(64, 64, sym=False, bias=True)}
    write_checkpoint(tmp_path / "src", layers, config=awq_config(), tensors_of=awq_tensors)
    assert_change_is_found(tmp_path, f"a.b.{leaf}", change, says)
