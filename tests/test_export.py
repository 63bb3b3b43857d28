"""Converted checkpoints turned back into GPTQ: exact, atomic, and refused when they cannot be."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    awq_config,
    awq_tensors,
    ct_config,
    ct_tensors,
    default_layers,
    gptq_config,
    gptq_tensors,
    make_layer,
    make_sparse,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from conversions import any_layer, convert_exactly, is_symmetric, refusals_of
from damage import (
    CHANGES,
    Damage,
    assert_changes_are_noticed,
    assert_refused,
    poke,
    put,
    remove,
    tensors,
    text,
    truncate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import grown
from safetensors.torch import load_file
from test_convert_marlin_24 import write_sparse
from torch import Tensor

import marlin
from marlin.cli import main
from marlin.convert import convert
from marlin.export import export
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.gptq import parse_gptq_config
from marlin.verify import verify

ROOT = Path(__file__).parents[1]
DEMO = Path(__file__).parent / "data" / "demo"
UP, DOWN = "model.layers.0.up", "model.layers.0.down"


def assert_gptq(directory: Path, layers: dict[str, GptqLayer], others: dict[str, Tensor]) -> None:
    """A GPTQ checkpoint of these layers, as the tests write one, and nothing else."""
    symmetric = all(bool((layer.zeros == 8).all()) for layer in layers.values())
    want = dict(others)
    for name, layer in layers.items():
        stored = gptq_tensors(layer, version=1 if symmetric else 2)
        want |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
    got = read_all(directory)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    quantization = settings_of(directory)
    assert quantization["sym"] is symmetric
    assert quantization["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


def settings_of(directory: Path) -> dict[str, Any]:
    """The settings of an exported checkpoint, which are in both places."""
    config = json.loads((directory / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]
    assert found == json.loads((directory / "quantize_config.json").read_text())
    assert (found["quant_method"], found["bits"]) == ("gptq", 4)
    return found


def assert_same_conversion(first: Path, second: Path) -> None:
    """Two conversions hold the same bits and settings."""
    one, other = read_all(first), read_all(second)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    configs = [json.loads((root / "config.json").read_text()) for root in (first, second)]
    assert configs[0] == configs[1]


def go_round(tmp_path: Path, **options: Any) -> marlin.ConversionReport:
    """src -> dst by convert, -> out by export, -> again by convert; all are verified."""
    convert(tmp_path / "src", tmp_path / "dst", progress=False, **options)
    before = snapshot(tmp_path / "dst")
    report = export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert snapshot(tmp_path / "dst") == before
    for one, other in (("out", "dst"), ("dst", "out"), ("out", "src")):
        assert verify(tmp_path / one, tmp_path / other, progress=False).mismatches == []
    convert(tmp_path / "out", tmp_path / "again", progress=False, **options)
    assert_same_conversion(tmp_path / "dst", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dst", "out", "src"]
    return report


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_variant_is_exact(
    tmp_path: Path, group_size: int, act_order: bool, sym: bool, version: int
) -> None:
    layers = {
        "a.b": make_layer(256, 64, group_size, sym=sym, act_order=act_order, bias=True),
        "a.c": make_layer(200, 72, group_size, sym=sym, dtype=torch.bfloat16),
    }
    config = gptq_config(
        group_size, sym=sym, checkpoint_format="gptq" if version == 1 else "gptq_v2"
    )
    source = write_checkpoint(tmp_path / "src", layers, config=config, version=version)
    report = go_round(tmp_path)
    assert_gptq(tmp_path / "out", layers, source.others)
    found = settings_of(tmp_path / "out")
    assert found["group_size"] == group_size
    assert found["desc_act"] is (act_order and group_size != -1)
    assert "dynamic" not in found
    assert (report.source_format, report.destination_format) == (
        "marlin", "gptq" if sym else "gptq_v2",
    )  # fmt: skip
    assert report.warnings == [
        "bfloat16 scales in 1 of 2 layers: some readers of GPTQ round them to float16; dtype "
        "float16 stores them so, where that is exact"
    ]


@settings(max_examples=30, deadline=None)
@given(layer=any_layer(step=8), shard_bytes=st.integers(1, 20_000))
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory, layer: GptqLayer, shard_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    symmetric = is_symmetric(layer)
    if not symmetric:
        layer.zeros[0, 0] = 0
    config = gptq_config(layer.group_size, sym=symmetric)
    source = write_checkpoint(root / "src", {"m.x": layer}, config=config)
    convert_exactly(root)
    export(root / "dst", root / "out", progress=False, shard_bytes=shard_bytes)
    assert_gptq(root / "out", source.layers, source.others)
    assert verify(root / "out", root / "dst", progress=False).equal


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_from_awq_and_compressed_tensors(tmp_path: Path, sym: bool, act_order: bool) -> None:
    layers = {"a.b": make_layer(256, 64, 64, sym=sym, act_order=act_order, bias=True)}
    if not sym:
        layers["a.b"].zeros[1, 5] = 0  # which a version 1 checkpoint could not tell from 16
    config = ct_config(64, symmetric=sym, actorder="group" if act_order else None)
    if act_order:
        source = write_checkpoint(tmp_path / "src", layers, config=config, tensors_of=ct_tensors)
    else:
        source = write_checkpoint(
            tmp_path / "src", layers, config=awq_config(64), tensors_of=awq_tensors
        )
    report = go_round(tmp_path)
    assert_gptq(tmp_path / "out", layers, source.others)
    assert report.warnings == []


@pytest.mark.parametrize("sym", [True, False])
def test_sparse_layers_become_the_dense_ones_that_they_equal(tmp_path: Path, sym: bool) -> None:
    layers = {
        "a.sparse": make_sparse(200, 72, sym=sym, bias=True, seed=1),
        "a.dense": make_layer(64, 64, sym=sym, seed=2),
    }
    source = write_checkpoint(tmp_path / "src", layers, config=gptq_config(sym=sym))
    report = go_round(tmp_path, sparse=True)
    assert "a.sparse.places" in read_all(tmp_path / "dst")
    assert_gptq(tmp_path / "out", layers, source.others)
    assert not any(layer.sparse for layer in report.layers)
    assert report.warnings == [
        "2:4 sparse weights in 1 of 2 layers: GPTQ has no form for them; they are written as the "
        "dense ones that they equal"
    ]


def test_stored_zeros_of_sparse_layers(tmp_path: Path) -> None:
    """A marlin-24 file stores weights that are zero, at places that no other format has."""
    source = write_sparse(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert_gptq(tmp_path / "out", source.layers, source.others)
    convert(tmp_path / "out", tmp_path / "again", progress=False, require_sparse=True)
    for one, other in (("out", "dst"), ("out", "src"), ("again", "src"), ("again", "dst")):
        assert verify(tmp_path / one, tmp_path / other, progress=False).mismatches == []


@pytest.mark.parametrize("name", ["gptq-g128", "gptq-g64-actorder"])
def test_checkpoint_of_a_third_party(tmp_path: Path, name: str) -> None:
    """What GPTQModel wrote comes back bit for bit."""
    if not (DEMO / name).is_dir():
        pytest.skip(f"tests/data/demo/{name} is not there")
    convert(DEMO / name, tmp_path / "dst", progress=False)
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    got, want = read_all(tmp_path / "out"), read_all(DEMO / name)
    assert set(got) == set(want)
    assert all(
        got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]) for key in want
    )
    found, original = settings_of(tmp_path / "out"), json.loads(
        (DEMO / name / "quantize_config.json").read_text()
    )  # fmt: skip
    assert {key: original[key] for key in found} == found
    copied = "generation_config.json"
    assert (tmp_path / "out" / copied).read_bytes() == (DEMO / name / copied).read_bytes()


class TestSettings:
    @pytest.fixture
    def layers(self) -> dict[str, GptqLayer]:
        return {
            "model.layers.0.up": make_layer(128, 64, 32, seed=1),
            "model.layers.1.up": make_layer(128, 64, 64, seed=2),
            "model.layers.1.upper": make_layer(128, 64, 32, seed=3),
            "model.layers.1.down": make_layer(128, 64, -1, sym=False, seed=4),
            "lm_head": make_layer(64, 64, 32, seed=5),
        }

    def test_modules_that_differ(self, tmp_path: Path, layers: dict[str, GptqLayer]) -> None:
        config = gptq_config(
            32,
            sym=None,
            dynamic={
                r"+:.*\.1\.up$": {"group_size": 64},
                r".*\.1\.down": {"group_size": -1},
                r"-:.*\.gate": {},
            },
        )
        others = {
            "model.embed.weight": torch.randn(50, 8),
            "model.layers.1.gate.weight": torch.randn(4, 8),
            "model.layers.2.up.weight": torch.randn(8, 8),
            "model.layers.1.norm.weight": torch.randn(8),
            "visual.blocks.0.up.weight": torch.randn(8, 8),
        }
        write_checkpoint(tmp_path / "src", layers, config=config, others=others)
        go_round(tmp_path)
        assert_gptq(tmp_path / "out", layers, others)
        found = settings_of(tmp_path / "out")
        assert (found["group_size"], found["sym"], found["lm_head"]) == (32, False, True)
        assert found["dynamic"] == {
            r"-:^model\.layers\.1\.gate$": {},
            r"-:^model\.layers\.2\.up$": {},
            r"+:^model\.layers\.1\.up$": {"group_size": 64},
            r"+:^model\.layers\.1\.down$": {"group_size": -1},
        }
        parsed = parse_gptq_config({"quantization_config": found})
        for name, layer in layers.items():
            of_module = parsed.settings(name)
            assert of_module is not None
            assert of_module.group_size == layer.group_size
        assert parsed.settings("model.layers.1.gate") is None

    def test_zeros_that_are_all_8(self, tmp_path: Path) -> None:
        """The source says that it is asymmetric, and is not."""
        source = write_checkpoint(tmp_path / "src", config=gptq_config(sym=False))
        report = go_round(tmp_path)
        assert report.destination_format == "gptq"
        assert_gptq(tmp_path / "out", source.layers, source.others)

    def test_other_settings_and_files_are_kept(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "src")
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        (tmp_path / "dst" / "extra").mkdir()
        (tmp_path / "dst" / "extra" / "chat.jinja").write_text("hello")
        (tmp_path / "dst" / "old.bin").write_text("weights")
        report = export(tmp_path / "dst", tmp_path / "out", progress=False)
        found = snapshot(tmp_path / "out")
        assert set(found) == {
            "config.json", "quantize_config.json", "model.safetensors", *report.copied_files,
        }  # fmt: skip
        assert found["extra/chat.jinja"] == b"hello"
        assert report.skipped_files == ["old.bin"]
        config = json.loads(found["config.json"])
        assert {key: config[key] for key in ("model_type", "hidden_size")} == {
            "model_type": "tiny", "hidden_size": 64,
        }  # fmt: skip

    def test_transformers_reads_them(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        write_checkpoint(tmp_path / "src")
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        export(tmp_path / "dst", tmp_path / "out", progress=False)
        config = transformers.GPTQConfig.from_dict(settings_of(tmp_path / "out"))
        assert (config.bits, config.group_size, config.desc_act, config.sym) == (4, 32, False, True)


def test_dtype(tmp_path: Path) -> None:
    layer = make_layer(64, 64, bias=True, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "src", {"a.b": layer})
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    report = export(tmp_path / "dst", tmp_path / "out", progress=False, dtype=torch.float16)
    assert report.warnings == []
    got = read_all(tmp_path / "out")
    assert got["a.b.scales"].dtype == got["a.b.bias"].dtype == torch.float16
    assert torch.equal(got["a.b.scales"], layer.scales.half())
    assert verify(tmp_path / "out", tmp_path / "dst", progress=False).equal
    layer.scales[1, 3] = 1e-9
    shutil.rmtree(tmp_path / "src")
    write_checkpoint(tmp_path / "src", {"a.b": layer})
    convert(tmp_path / "src", tmp_path / "dst2", progress=False)
    with pytest.raises(CheckpointError, match=r"a\.b: scales: .*must hold every element exactly"):
        export(tmp_path / "dst2", tmp_path / "out2", progress=False, dtype=torch.float16)


def test_what_gptq_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    layers = {
        "a.k": make_layer(60, 64, seed=1),
        "a.n": make_layer(64, 36, seed=2),
        "a.both": make_layer(36, 60, seed=3),
        "a.fits": make_layer(64, 64, seed=4),
    }
    write_checkpoint(tmp_path / "src", layers, config=ct_config(symmetric=False),
                     tensors_of=ct_tensors)  # fmt: skip
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    before = snapshot(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError) as caught:
            export(tmp_path / "dst", tmp_path / "out", progress=False, dry_run=dry_run)
        reasons = caught.value.refusals
        assert sorted(reason.split("; GPTQ packs")[0] for reason in reasons) == [
            "a.both: in_features: got 36",
            "a.both: out_features: got 60",
            "a.k: in_features: got 60",
            "a.n: out_features: got 36",
        ]
        assert all("must be a multiple of 8; keep" in reason for reason in reasons)
    assert snapshot(tmp_path) == before
    damaged = read_all(tmp_path / "dst")
    damaged["a.fits.scales"][0, 0] = float("nan")  # what is wrong with values is said, too
    write_tensors(tmp_path / "dst", damaged)
    with pytest.raises(CheckpointError, match=r"a\.fits: scales: got nan") as caught:
        export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert len(caught.value.refusals) == 5


def test_arguments(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"is 'gptq', not 'marlin'.*`marlin convert` first"):
        export(tmp_path / "src", tmp_path / "out", progress=False)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    with pytest.raises(ValueError, match="format is 'awq'; choose one of gptq"):
        export(tmp_path / "dst", tmp_path / "out", format="awq")
    with pytest.raises(ValueError, match=r"dtype is torch\.float32; choose"):
        export(tmp_path / "dst", tmp_path / "out", dtype=torch.float32)
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        export(tmp_path / "dst", tmp_path / "out", shard_bytes=0)
    for place, reason in (("dst/x", "source or inside"), ("src", "is not empty")):
        with pytest.raises(CheckpointError, match=reason):
            export(tmp_path / "dst", tmp_path / place, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_dry_run_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "src", shards=3)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    arguments = ["export", str(tmp_path / "dst"), str(tmp_path / "out"), "--format", "gptq"]
    assert main([*arguments, "--dry-run"]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["layer", *sorted(default_layers())]
    assert re.match(r"would export 3 layers .* as gptq; nothing was written", total)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]
    dry = export(tmp_path / "dst", tmp_path / "out", dry_run=True, shard_bytes=4000)
    assert main([*arguments, "--shard-size", "4000", "--json"]) == 0
    wet = json.loads(capsys.readouterr().out)
    assert (wet["bytes_after"], wet["shards"]) == (dry.bytes_after, dry.shards)
    assert len(dry.shards) > 2
    assert wet["layers"] == dry.to_dict()["layers"]
    size = sum(info.nbytes for info in Checkpoint.open(tmp_path / "out").tensors.values())
    assert size == dry.bytes_after
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "dst")]) == 0
    shutil.rmtree(tmp_path / "out")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert re.search(r"exported 3 layers .* as gptq, [\d.]+ s\nwritten to ", out)
    assert err == ""
    assert main(arguments) == 2
    assert "is not empty; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("qweight", lambda t: t[3, 5].bitwise_xor_(1 << 8), "weight row 5, column 26 is"),
        ("qzeros", lambda t: t[1, 2].bitwise_xor_(1), r"zeros row 1 \(group\), column 16 is"),
        ("scales", lambda t: t[1, 5].mul_(2), r"scales row 1 \(group\), column 5 is"),
        ("g_idx", lambda t: t[7].sub_(1), r"input feature 7 is in group -?\d, want \d"),
        ("bias", lambda t: t[7].add_(1), "bias column 7 is"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    layers = {"a.b": make_layer(64, 64, sym=False, act_order=True, bias=True)}
    write_checkpoint(tmp_path / "src", layers, config=gptq_config(sym=False))
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    changed = read_all(tmp_path / "out")
    change(changed[f"a.b.{leaf}"])
    write_tensors(tmp_path / "out", changed)
    (mismatch,) = verify(tmp_path / "out", tmp_path / "dst", progress=False).mismatches
    assert re.match(rf"a\.b: {says}", mismatch), mismatch


def settings_damage(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        change(config["quantization_config"])
        (root / "config.json").write_text(json.dumps(config))

    return damage


def module(name: str, **changes: Any) -> Damage:
    return settings_damage(lambda q: q["modules"][name].update(changes))


ORDERED, SPARSE = "model.ordered", "model.sparse"

CASES: dict[str, tuple[Damage, str]] = {
    "empty file": (truncate(0), "is truncated: 0 bytes"),
    "half the data": (truncate(-3000), "is truncated: its header needs"),
    "last byte lost": (truncate(-1), "is truncated"),
    "no weights": (remove("model.safetensors"), r"no \.safetensors file"),
    "no config": (remove("config.json"), "config.json cannot be read"),
    "invalid config": (text("config.json", '{"a": '), "config.json is not valid JSON"),
    "not quantized": (text("config.json", "{}"), "quant_method is None, not 'marlin'"),
    "no version": (settings_damage(lambda q: q.pop("format_version")), "original Marlin kernel"),
    "later version": (settings_damage(lambda q: q.update(format_version=9)), "format_version is 9"),
    "8 bits": (settings_damage(lambda q: q.update(bits=8)), "bits is 8, want 4"),
    "modules are a list": (settings_damage(lambda q: q.update(modules=[])), "modules is"),
    "no modules": (
        tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers")]),
        "up: qweight is missing",
    ),
    "group size 48": (module(UP, group_size=48), r"modules\['model.layers.0.up'\] is"),
    "another group size": (module(UP, group_size=64), r"up: scales is F16 \[2, 96\], want"),
    "other sizes": (module(UP, in_features=640), r"up: qweight is I32 \[2, 1, 512\], want"),
    "unlisted": (settings_damage(lambda q: q["modules"].pop(UP)), "config.json does not list it"),
    "not sparse": (
        settings_damage(lambda q: q["modules"][SPARSE].pop("sparsity")),
        r"sparse: has places, which a dense layer",
    ),
    "qweight missing": (tensors(lambda t: t.pop(f"{UP}.qweight")), "up: qweight is missing"),
    "scales missing": (tensors(lambda t: t.pop(f"{UP}.scales")), "up: scales is missing"),
    "places missing": (tensors(lambda t: t.pop(f"{SPARSE}.places")), "sparse: places is missing"),
    "a stray tensor": (
        tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(2)})),
        r"up: weight beside qweight: a quantized linear layer has only",
    ),
    "qweight int64": (put(f"{UP}.qweight", Tensor.long), r"up: qweight is I64"),
    "qweight short": (put(f"{UP}.qweight", lambda t: t[:-1]), r"up: qweight is I32 \[1, 1, 512\]"),
    "scales float32": (put(f"{UP}.scales", Tensor.float), r"up: scales is F32 .*want F16"),
    "scale NaN": (poke(f"{UP}.scales", (1, 3), float("nan")), r"up: scales: got nan at \[1, 3\]"),
    "bias NaN": (poke(f"{DOWN}.bias", (4,), float("nan")), r"down: bias: got nan at \[4\]"),
    "bias short": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias is F16 \[63\]"),
    "zero of 16": (poke(f"{ORDERED}.zeros", (0, 5), 16), "ordered: zeros holds 16, want 0..15"),
    "perm twice": (poke(f"{ORDERED}.perm", (0,), 5), "ordered: perm is not a permutation of 0..63"),
    "perm out of range": (poke(f"{ORDERED}.perm", (0,), 64), "perm is not a permutation"),
    "perm negative": (poke(f"{ORDERED}.perm", (0,), -1), "perm is not a permutation"),
    "places fall": (poke(f"{SPARSE}.places", (0, 0, 0), 0), r"sparse: places: got 0x00000000 at"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("valid")
    layers = default_layers() | {
        ORDERED: make_layer(64, 64, act_order=True, sym=False),
        SPARSE: make_sparse(64, 64, seed=3),
    }
    write_checkpoint(root / "src", layers, config=gptq_config(sym=None))
    convert(root / "src", root / "dst", progress=False, sparse=True)
    export(root / "dst", root / "out", progress=False)  # it is valid
    return root / "dst"


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, valid: Path, case: str) -> None:
    assert_refused(tmp_path, valid, *CASES[case], run=export)


def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: Path) -> None:
    def change(found: dict[str, Tensor]) -> None:
        found[f"{ORDERED}.perm"][0] = 99
        found[f"{ORDERED}.zeros"][0, 0] = 77
        found[f"{SPARSE}.places"][0, 0, 0] = 0
        found[f"{UP}.scales"][1, 3] = float("inf")

    assert len(refusals_of(tmp_path, valid, tensors(change), export)) == 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small layers: a byte of each kind of tensor can be hit."""
    root = tmp_path_factory.mktemp("small")
    layers = {
        "a.b": make_layer(64, 8, sym=False, act_order=True, bias=True, seed=1),
        "a.c": make_sparse(64, 8, sym=False, seed=2),
    }
    others = {"norm.weight": torch.ones(4)}
    write_checkpoint(root / "src", layers, config=gptq_config(sym=False), others=others)
    convert(root / "src", root / "dst", progress=False, sparse=True)
    return root / "dst"


@settings(max_examples=150, deadline=None)
@given(**CHANGES)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, small: Path, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), small, **change, run=export)


@pytest.mark.parametrize("step", ["_write_all", "_write_layer", "write_index", "write_file"])
def test_kill_at_each_step(tmp_path: Path, step: str) -> None:
    source = write_checkpoint(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    place = "marlin.rewrite.Rewrite" if step == "_write_all" else "marlin.rewrite"
    code = (
        "import os, sys\n"
        "import marlin.rewrite\n"
        "from marlin.export import export\n"
        f"{place}.{step} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "export(sys.argv[1], sys.argv[2], shard_bytes=4000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dst"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert_gptq(tmp_path / "out", source.layers, source.others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "out", "src"]


def test_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has become asymmetric since it was examined: the settings written no longer hold."""
    layers = {"a.b": make_layer(64, 64, seed=1), "a.c": make_layer(64, 64, sym=False, seed=2)}
    write_checkpoint(tmp_path / "src", layers, config=gptq_config(sym=None))
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    examined = sys.modules["marlin.export"]
    examine = examined.survey  # type: ignore[attr-defined]

    def change_after(*arguments: Any) -> Any:
        found = examine(*arguments)
        changed = read_all(tmp_path / "dst")
        changed["a.c.zeros"].fill_(8)
        write_tensors(tmp_path / "dst", changed)
        return found

    monkeypatch.setattr(examined, "survey", change_after)
    with pytest.raises(CheckpointError, match=r"a\.c\.zeros changed while it was exported"):
        export(tmp_path / "dst", tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("act_order", [True, False])
def test_memory_is_bounded_by_a_layer(tmp_path: Path, act_order: bool) -> None:
    """24 layers of 2 MB in one file: the peak grows by a few layers, not by the file."""
    layers = dict.fromkeys(
        [f"m.{i}" for i in range(24)], make_layer(2048, 2048, 128, act_order=act_order)
    )
    others = {"embed.weight": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}
    write_checkpoint(tmp_path / "src", layers, others=others)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    peak = grown("marlin.export(source, target)", tmp_path / "dst", tmp_path / "out")
    assert peak < 60  # the source has at least 98 MiB


def test_the_exported_file_is_a_plain_one(tmp_path: Path) -> None:
    """The safetensors library reads it, and its tensors are aligned."""
    write_checkpoint(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    marlin.export(tmp_path / "dst", tmp_path / "out", progress=False)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name
