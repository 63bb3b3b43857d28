"""Whole AWQ checkpoints: converted, verified, loaded, and refused when damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    Tiny,
    assert_holds,
    awq_config,
    awq_tensors,
    default_layers,
    dequantized,
    make_layer,
    make_sparse,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from damage import (
    CHANGES,
    Damage,
    assert_changes_are_noticed,
    assert_refused,
    poke,
    put,
    remove,
    several,
    sharded,
    tensors,
    text,
    truncate,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert_24 import stored_weight
from torch import Tensor

from marlin import load
from marlin.cli import main
from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

UP, DOWN = "model.layers.0.up", "model.layers.0.down"


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
    before = snapshot(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    assert snapshot(tmp_path / "src") == before
    assert report.source_format == "awq"
    assert [(layer.zeros, layer.act_order) for layer in report.layers] == [(asymmetric, False)] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    with torch.device("meta"):
        model = Tiny()
    load(model, tmp_path / "dst")
    assert model.head.weight is model.model.embed.weight
    tokens = torch.arange(50)
    with torch.no_grad():
        got = model(tokens, torch.float16)
        want = dequantized(source)(tokens, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))


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
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    changed = read_all(tmp_path / "src")
    change(changed[f"a.b.{leaf}"])
    write_tensors(tmp_path / "src", changed)
    (mismatch,) = verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches
    assert re.match(rf"a\.b: {says}", mismatch), mismatch


def config(**changes: Any) -> Damage:
    return text("config.json", json.dumps(awq_config(**changes)))


def add(name: str, tensor: Tensor) -> Damage:
    return tensors(lambda found: found.update({name: tensor}))


OLDER = {"zero_point": True, "q_group_size": 64, "w_bit": 4}
CASES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate(-3000), "is truncated: its header needs"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    "no config": (remove("config.json"), "config.json cannot be read"),
    # the configuration
    "8 bits": (config(bits=8), "bits: got 8; only 4-bit"),
    "bits as text": (config(bits="4"), "bits: got '4'"),
    "no bits": (config(bits=None), "bits: got None"),
    "no group size": (config(group_size=None), "group_size: got None"),
    "group size 16": (config(group_size=16), "group_size: got 16; it must be -1, 32, 64 or 128"),
    "gemv": (config(version="gemv"), "version: got 'gemv'.*only 'gemm' is read"),
    "gemv_fast": (config(version="GEMV_FAST"), "version: got 'GEMV_FAST' .16-bit words"),
    "version 1": (config(version=1), "version: got 1"),
    "format of another tool": (config(format="gemv"), "format: got 'gemv'"),
    "pack dtype": (config(pack_dtype="int16"), "pack_dtype: got 'int16'; only int32"),
    "dynamic": (config(dynamic={".*": {"bits": 8}}), "dynamic: got settings of single modules"),
    "zero point as text": (config(zero_point="yes"), "zero_point: got 'yes'"),
    "not a list": (config(modules_to_not_convert="lm_head"), "modules_to_not_convert: got 'lm"),
    "not names": (config(modules_to_not_convert=[3]), r"modules_to_not_convert: got \[3\]"),
    "two configs disagree": (
        text("quant_config.json", json.dumps(OLDER)),
        "config.json and quant_config.json disagree on group_size: 32 and 64",
    ),
    "second config of another tool": (
        text("quantize_config.json", json.dumps({**OLDER, "quant_method": "gptq"})),
        "quant_method: got 'gptq'",
    ),
    "second config broken": (text("quant_config.json", "[]"), "quant_config.json holds a JSON"),
    "excluded but quantized": (
        config(modules_to_not_convert=["layers.0"]),
        r"0\.up: modules_to_not_convert has 'layers\.0', but the layer has",
    ),
    "said to be symmetric": (
        several(config(zero_point=False), poke(f"{UP}.qzeros", (1, 2), 0x77777777)),
        r"0\.up: zero points: got 7 in group 1, column 16; with zero_point: false",
    ),
    "another group size": (
        config(group_size=64),
        r"0\.up: scales: got 2 groups for in_features=64; with group_size 64 .*must be 1",
    ),
    # the layers
    "qweight missing": (tensors(lambda t: t.pop(f"{UP}.qweight")), r"0\.up: qweight is missing"),
    "qzeros missing": (tensors(lambda t: t.pop(f"{UP}.qzeros")), r"0\.up: qzeros is missing"),
    "scales missing": (tensors(lambda t: t.pop(f"{UP}.scales")), r"0\.up: scales is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layers" in k]),
        "no quantized layer.*format awq",
    ),
    "gptq tensors": (
        add(f"{UP}.g_idx", torch.zeros(64, dtype=torch.int32)),
        r"0\.up: g_idx beside qweight, qzeros: a quantized linear layer has only",
    ),
    "weight beside qweight": (add(f"{UP}.weight", torch.zeros(2)), r"0\.up: weight beside"),
    "no module name": (add("qweight", torch.zeros(2)), "belong to no named module"),
    "qweight int64": (put(f"{UP}.qweight", Tensor.long), r"0\.up: qweight: got int64"),
    "qweight flat": (put(f"{UP}.qweight", Tensor.flatten), r"qweight: got int32 \[768\]"),
    "qweight empty": (put(f"{UP}.qweight", lambda t: t[:0]), r"qweight: got int32 \[0, 12\]"),
    "rows lost": (put(f"{UP}.qweight", lambda t: t[:-32]), r"scales: got 2 groups for in_feat"),
    "columns lost": (put(f"{UP}.qweight", lambda t: t[:, :-1]), r"has 88 output features"),
    "packed along K": (put(f"{UP}.qweight", lambda t: t.reshape(8, 96)), "768 output features"),
    "qzeros float": (put(f"{UP}.qzeros", Tensor.float), r"qzeros: got float32 \[2, 12\]"),
    "qzeros row lost": (put(f"{UP}.qzeros", lambda t: t[:1]), r"qzeros: got int32 \[1, 12\]"),
    "scales int": (put(f"{UP}.scales", Tensor.int), r"scales: got int32"),
    "scales row lost": (
        several(put(f"{UP}.scales", lambda t: t[:1]), put(f"{UP}.qzeros", lambda t: t[:1])),
        r"0\.up: scales: got 1 groups .*must be 2",
    ),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"0\.down: bias: got float16 \[63\]"),
    "bias int": (put(f"{DOWN}.bias", Tensor.int), r"0\.down: bias: got int32"),
    "scale NaN": (poke(f"{UP}.scales", (1, 3), float("nan")), r"up: scales: got nan at \[1, 3\]"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
    "scales float32": (put(f"{UP}.scales", Tensor.float), "dtype=torch.float16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("valid") / "src"
    return write_checkpoint(root, config=awq_config(), tensors_of=awq_tensors).directory


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, valid: Path, case: str) -> None:
    assert_refused(tmp_path, valid, *CASES[case])


def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(valid, source)

    def change(found: dict[str, Tensor]) -> None:
        found[f"{UP}.scales"][1, 3] = float("nan")
        found[f"{DOWN}.bias"][0] = float("nan")
        found.pop("model.layers.1.up.scales")

    tensors(change)(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "dst", progress=False)
    assert [text.split(":")[0] for text in sorted(caught.value.refusals)] == list(
        sorted(default_layers())
    )


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**CHANGES)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, valid: Path, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), valid, **change)
