"""Whole checkpoints of the original Marlin kernel's packing, however their settings call it."""

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
    GptqLayer,
    Source,
    assert_holds,
    gptq_tensors,
    make_layer,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from conversions import assert_loads, convert_exactly, model_of
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
from memory import grown
from test_formats_original_marlin import write
from torch import Tensor

from marlin import load
from marlin.cli import main
from marlin.convert import convert
from marlin.export import export
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

UP, DOWN = "model.up", "model.down"

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
    """A ``config.json``; ``changes`` go to its quantization_config, None removes a key."""
    settings = {"bits": 4, "sym": True, "desc_act": False, "group_size": group_size}
    settings = {**settings, **STYLES[style], **changes}
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
    before = snapshot(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert snapshot(tmp_path / "src") == before
    assert report.source_format == "original-marlin"
    assert report.warnings == []
    assert_holds(tmp_path / "dst", source)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


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
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    changed = read_all(tmp_path / "src")
    change(changed[f"{UP}.{leaf}"])
    write_tensors(tmp_path / "src", changed)
    (mismatch,) = verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches
    assert re.match(rf"model\.up: {says}", mismatch), mismatch


def config(**changes: Any) -> Damage:
    return text("config.json", json.dumps(marlin_config(**changes)))


def add(name: str, tensor: Tensor) -> Damage:
    return tensors(lambda found: found.update({name: tensor}))


CASES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate(-300), "is truncated: its header needs"),
    "half a header": (truncate(100), "is truncated"),
    "no config": (remove("config.json"), "config.json cannot be read"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    # the configuration
    "8 bits": (config(bits=8), "bits: got 8 with the packing of the original Marlin kernel"),
    "bits as text": (config(bits="4"), "bits: got '4'"),
    "bits true": (config(bits=True), "bits: got True"),
    "no group size": (config(group_size=None), "group_size: got None .* groups of 128, or one"),
    "group size 64": (config(group_size=64), "group_size: got 64 with"),
    "group size 128.0": (config(group_size=128.0), r"group_size: got 128\.0 with"),
    "asymmetric": (config(sym=False), "sym: got False .* stores no zero points"),
    "order": (config(desc_act=True), "desc_act: got True .* stores no order of the features"),
    "pack dtype": (config(pack_dtype="int16"), "pack_dtype: got 'int16'"),
    "alias disagrees": (config(w_bit=8), "bits is 4 but its alias w_bit is 8"),
    "overrides": (config(dynamic={".*up": {"bits": 8}}), "dynamic: got .*only exclusions"),
    "dynamic is a list": (config(dynamic=[1]), r"dynamic: got \[1\]"),
    "formats disagree": (
        config(style="autogptq 0.7", checkpoint_format="gptq"),
        "checkpoint_format: got 'gptq' with the packing",
    ),
    "two configs disagree": (
        text("quantize_config.json", json.dumps({"bits": 4, "group_size": -1})),
        "disagree on group_size: 128 and -1",
    ),
    "second config of another tool": (
        several(
            text("config.json", "{}"),
            text("quantize_config.json", '{"quant_method": "awq", "format": "marlin"}'),
        ),
        "quant_method: got 'awq' with the packing .*group_size: got None",
    ),
    "said to be gptq": (
        config(style="autogptq 0.7", is_marlin_format=None),
        r"no quantized layer: no tensor is called <module>\.qweight, as the format gptq",
    ),
    "said to be awq": (config(quant_method="awq"), "checkpoint_format: got 'marlin'"),
    "said to be ours": (config(style="own", format_version=1), "own format already"),
    "said to be 2:4": (
        config(checkpoint_format="marlin_24"),
        "up: B beside s: a quantized linear layer has only B_24, s, B_meta, bias",
    ),
    # the layers
    "B missing": (tensors(lambda t: t.pop(f"{UP}.B")), "up: B is missing"),
    "s missing": (tensors(lambda t: t.pop(f"{UP}.s")), "up: s is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith((UP, DOWN))]),
        "no quantized layer.*<module>.B, as the format original-marlin",
    ),
    "weight beside B": (add(f"{UP}.weight", torch.zeros(2)), "up: weight beside B, s: a quantized"),
    "g_idx beside B": (add(f"{UP}.g_idx", torch.zeros(384).int()), "up: g_idx beside B, s"),
    "no module name": (add("B", torch.zeros(2)), "belong to no named module"),
    "B int64": (put(f"{UP}.B", Tensor.long), r"up: B: got int64 \[24, 128\]; it must be int32"),
    "B flat": (put(f"{UP}.B", Tensor.flatten), r"up: B: got int32 \[3072\]"),
    "B empty": (put(f"{UP}.B", lambda t: t[:0]), r"up: B: got int32 \[0, 128\]"),
    "B rows lost": (put(f"{UP}.B", lambda t: t[:-8]), r"up: s: got float16 \[3, 64\].*\[2, 64\]"),
    "B columns lost": (put(f"{UP}.B", lambda t: t[:, :-64]), "up: B: .* multiple of 64"),
    "8-bit words": (put(f"{UP}.B", lambda t: t.repeat(1, 2)), "up: s: got .*out_features=128"),
    "s int": (put(f"{UP}.s", Tensor.int), r"up: s: got int32"),
    "s float32": (put(f"{UP}.s", Tensor.float), r"up: s: got float32.*dtype=torch.float16"),
    "s group lost": (put(f"{UP}.s", lambda t: t[:2]), r"up: s: got float16 \[2, 64\]"),
    "s of one group": (
        put(f"{UP}.s", lambda t: t[:1]),
        "up: s: got 1 groups for in_features=384; with group_size 128 .*must be 3",
    ),
    "another group size": (config(group_size=-1), "up: s: got 3 groups .*must be 1"),
    "s NaN": (poke(f"{UP}.s", (1, 3), float("nan")), "up: s: got nan at"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias: got float16 \[127\]"),
    "bias int": (put(f"{DOWN}.bias", Tensor.int), "down: bias: got int32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marlin(tmp_path_factory.mktemp("valid") / "src").directory


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, valid: Path, case: str) -> None:
    assert_refused(tmp_path, valid, *CASES[case])


def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(valid, source)

    def change(found: dict[str, Tensor]) -> None:
        found[f"{UP}.s"][1, 3] = float("nan")
        found[f"{DOWN}.bias"][0] = float("nan")

    tensors(change)(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "dst", progress=False)
    assert len(caught.value.refusals) == 2


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**CHANGES)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, valid: Path, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), valid, **change)


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
