"""Damaged, contradictory and malicious checkpoints: refused with the reason, and nothing is
written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    default_layers,
    gptq_config,
    make_layer,
    write_checkpoint,
)
from conversions import refusals_of
from damage import (
    CHANGES,
    Damage,
    assert_changes_are_noticed,
    assert_exact_or_refused,
    assert_refused,
    header,
    patch,
    poke,
    put,
    remove,
    several,
    sharded,
    tensors,
    text,
    truncate,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

UP, DOWN = "model.layers.0.up", "model.layers.0.down"


def config(**changes: Any) -> Damage:
    def damage(root: Path) -> None:
        (root / "config.json").write_text(json.dumps(gptq_config(**changes)))

    return damage


def replace_by_pipe(root: Path) -> None:
    weights(root).unlink()
    os.mkfifo(weights(root))


SHARD = "model-00001-of-00003.safetensors"
Entries = dict[str, Any]


def grow(name: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[name]["shape"][0] += 1

    return change


def overlap(entries: Entries) -> None:
    """Make a tensor share the bytes of another one of its size."""
    names = [name for name in entries if name.endswith("up.g_idx") or name.endswith("down.bias")]
    first = entries[names[0]]
    size = first["data_offsets"][1] - first["data_offsets"][0]
    other = next(
        entry
        for name, entry in entries.items()
        if name not in ("__metadata__", names[0]) and entry["data_offsets"][0] >= size
    )
    other["data_offsets"] = [offset - 8 for offset in other["data_offsets"]]


def duplicate_key(entries: Entries) -> bytes:
    content = json.dumps(entries)
    entry = json.dumps(entries[f"{UP}.g_idx"])
    return (content[:-1] + f', "{UP}.g_idx": {entry}}}').encode()


CASES: dict[str, tuple[Damage, str]] = {
    # the file
    "empty file": (truncate(0), r"model\.safetensors is truncated: 0 bytes"),
    "half a length": (truncate(4), "is truncated"),
    "length only": (truncate(8), "is truncated"),
    "half a header": (truncate(200), "is truncated"),
    "half the data": (truncate(-3000), "is truncated: its header needs"),
    "last byte lost": (truncate(-1), "is truncated"),
    "tail": (lambda r: weights(r).write_bytes(weights(r).read_bytes() + b"x"), "1 bytes after its"),
    "huge header": (patch(0, b"\xff" * 8), "truncated.*18446744073709551615"),
    "header beyond the file": (patch(0, (10**6).to_bytes(8, "little")), "header of 1000000 bytes"),
    "garbage header": (patch(8, b"\xff\xfe\x00"), "header of model.safetensors is not valid JSON"),
    "not an object": (header(lambda e: b"[1, 2]"), "holds a JSON list"),
    "deep nesting": (header(lambda e: b'{"a":' * 90_000), "not valid JSON"),
    "long number": (header(lambda e: b'{"a": ' + b"9" * 9000 + b"}"), "not valid JSON"),
    "name twice": (header(duplicate_key), "appears twice"),
    "lone surrogate": (header(lambda e: json.dumps({"\ud800": 1}).encode()), "not valid JSON"),
    "entry without dtype": (header(lambda e: e[f"{UP}.scales"].pop("dtype")), "exactly dtype"),
    "unknown dtype": (
        header(lambda e: e[f"{UP}.scales"].update(dtype="F13")),
        r"up\.scales.*dtype 'F13' is unknown",
    ),
    "negative shape": (header(lambda e: e[f"{UP}.scales"].update(shape=[-2, 96])), "its shape"),
    "boolean shape": (header(lambda e: e[f"{UP}.scales"].update(shape=[True, 96])), "its shape"),
    "absurd shape": (
        header(lambda e: e[f"{UP}.scales"].update(shape=[10**30])),
        "larger than any tensor's",
    ),
    "absurd shape, a product": (
        header(lambda e: e[f"{UP}.scales"].update(shape=[2**63] * 20)),
        "larger than any tensor's",
    ),
    "absurd shape, empty": (
        header(lambda e: e[f"{UP}.scales"].update(shape=[0, 2**70])),
        "larger than any tensor's",
    ),
    "absurd number of dimensions": (
        header(lambda e: e[f"{UP}.scales"].update(shape=[0] * 30000)),
        "of 30000 dimensions is",
    ),
    "shape too large": (header(grow(f"{UP}.scales")), "takes 576 bytes but its data_offsets hold"),
    "offsets reversed": (
        header(lambda e: e[f"{UP}.scales"]["data_offsets"].reverse()),
        r"are not \[start, stop\]",
    ),
    "overlap": (header(overlap), "overlaps the tensor before|leaves a hole"),
    "metadata": (header(lambda e: e.update(__metadata__={"a": 1})), "strings to strings"),
    "a directory": (lambda r: (weights(r).unlink(), weights(r).mkdir()), "not a regular file"),
    "a pipe": (replace_by_pipe, "not a regular file"),
    "dangling link": (
        lambda r: (weights(r).unlink(), weights(r).symlink_to("gone")),
        "No such file",
    ),
    "no weights": (remove("model.safetensors"), r"no \.safetensors file"),
    "pickles only": (
        lambda r: weights(r).rename(r / "pytorch_model.bin"),
        "pytorch_model.bin are pickles",
    ),
    "two files, no index": (
        lambda r: shutil.copy(weights(r), r / "other.safetensors"),
        "2 .safetensors files and no index",
    ),
    # the index
    "shard missing": (sharded(lambda r, m: (r / SHARD).unlink()), f"{SHARD} is named by the index"),
    "stray shard": (
        sharded(lambda r, m: shutil.copy(r / SHARD, r / "stray.safetensors")),
        "stray.safetensors is not named by the index",
    ),
    "path traversal": (
        sharded(lambda r, m: m.update({next(iter(m)): "../out.safetensors"})),
        "in the checkpoint's own folder",
    ),
    "absolute path": (
        sharded(lambda r, m: m.update({next(iter(m)): "/etc/x.safetensors"})),
        "in the checkpoint's own folder",
    ),
    "index to number": (sharded(lambda r, m: m.update({next(iter(m)): 3})), "not a file name"),
    "index to another file": (
        sharded(lambda r, m: m.update({next(iter(m)): "config.json"})),
        "must be a .safetensors file",
    ),
    "tensor not indexed": (sharded(lambda r, m: m.pop(next(iter(m)))), "does not name it"),
    "tensor only indexed": (
        sharded(lambda r, m: m.update({"ghost.weight": SHARD})),
        "'ghost.weight' is missing from",
    ),
    "tensor in two shards": (
        sharded(lambda r, m: shutil.copy(r / SHARD, r / SHARD.replace("1-of", "2-of"))),
        "is in both",
    ),
    "two indexes": (
        sharded(lambda r, m: text("b.safetensors.index.json", "{}")(r)),
        "several indexes",
    ),
    "empty index": (text("model.safetensors.index.json", "{}"), "no weight_map"),
    # the configuration
    "no config": (remove("config.json"), "config.json cannot be read"),
    "invalid config": (text("config.json", '{"a": '), "config.json is not valid JSON"),
    "config not UTF-8": (text("config.json", b'{"a": "\xff"}'), "config.json is not valid JSON"),
    "config is a list": (text("config.json", "[]"), "holds a JSON list"),
    "not quantized": (text("config.json", "{}"), "not a quantized checkpoint"),
    "config key twice": (text("config.json", '{"a": 1, "a": 2}'), "'a' appears twice"),
    "quantization is a string": (
        text("config.json", '{"quantization_config": "gptq"}'),
        "not an object",
    ),
    "8 bits": (config(bits=8), "bits is 8; only 4-bit"),
    "3 bits": (config(bits=3), "bits is 3"),
    "2 bits": (config(bits=None, wbits=2), "bits is 2"),
    "bits as text": (config(bits="4"), "bits is '4'"),
    "bits true": (config(bits=True), "bits is True"),
    "no bits": (config(bits=None), "bits is None"),
    "no group size": (config(group_size=None), "group_size is None"),
    "group size 256": (config(group_size=256), "group_size is 256; supported are -1, 32, 64, 128"),
    "alias disagrees": (config(w_bit=8), "bits is 4 but its alias w_bit is 8"),
    "sym as text": (config(sym="yes"), "sym is 'yes'"),
    "said to be awq": (config(quant_method="awq"), "checkpoint_format: got 'gptq'"),
    "awq in the other file": (
        several(text("config.json", "{}"), text("quantize_config.json", '{"quant_method": "awq"}')),
        "quant_method is 'awq' .which belongs into quantization_config in config.json",
    ),
    "awq by its keys": (config(quant_method=None, zero_point=True), "AWQ's keys"),
    "marlin method": (config(quant_method="marlin"), "original Marlin kernel"),
    "own method": (config(quant_method="marlin", format_version=1), "own format already"),
    "method is a list": (config(quant_method=["gptq"]), "not a name"),
    "marlin format": (config(checkpoint_format="marlin"), "original Marlin kernel"),
    "is_marlin_format": (
        config(is_marlin_format=True),
        "checkpoint_format: got 'gptq' with the packing of the original Marlin kernel",
    ),
    "is_marlin_format as text": (config(is_marlin_format="yes"), "it must be true or false"),
    "original marlin, other tensors": (
        config(quant_method="marlin", group_size=128, checkpoint_format=None),
        r"no tensor is called <module>\.B, as the format original-marlin has it",
    ),
    "bitblas": (config(checkpoint_format="bitblas"), "BitBLAS"),
    "planar": (config(checkpoint_format="gptq_p"), "planar packing"),
    "exllama": (config(checkpoint_format=None, format="exl2"), "ExLlamaV2"),
    "unknown format": (config(checkpoint_format="wow"), "'wow' .unknown here"),
    "pack dtype": (config(pack_dtype="int16"), "pack_dtype is 'int16'; only int32"),
    "two configs disagree": (
        text("quantize_config.json", json.dumps({"bits": 4, "group_size": 64})),
        "disagree on group_size: 32 and 64",
    ),
    "second config broken": (text("quantize_config.json", "{"), "quantize_config.json is not"),
    "dynamic not a map": (config(dynamic=[1]), "dynamic is .1., not a map"),
    "dynamic regex": (config(dynamic={"+:(": {}}), "not a valid regular expression"),
    "dynamic 8 bits": (
        config(dynamic={r".*\.up": {"bits": 8}}),
        r"for model\.layers\.0\.up: bits is 8",
    ),
    "dynamic not overrides": (config(dynamic={"x": 5}), "overrides are 5, not a map"),
    "excluded but quantized": (
        config(dynamic={r"-:.*\.up": {}}),
        r"0\.up: the config's dynamic excludes it, but it has",
    ),
    # the layers
    "qweight missing": (tensors(lambda t: t.pop(f"{UP}.qweight")), r"0\.up: qweight is missing"),
    "qzeros missing": (tensors(lambda t: t.pop(f"{UP}.qzeros")), r"0\.up: qzeros is missing"),
    "scales missing": (tensors(lambda t: t.pop(f"{UP}.scales")), r"0\.up: scales is missing"),
    "g_idx missing": (tensors(lambda t: t.pop(f"{UP}.g_idx")), r"0\.up: g_idx is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layers" in k]),
        "no quantized layer",
    ),
    "weight beside qweight": (
        tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(2)})),
        r"0\.up: weight beside qweight",
    ),
    "reserved name": (
        tensors(lambda t: t.update({f"{UP}.perm": torch.zeros(2)})),
        r"0\.up: perm beside qweight",
    ),
    "no module name": (
        tensors(lambda t: t.update(qweight=torch.zeros(2))),
        "belong to no named module",
    ),
    "qweight int64": (put(f"{UP}.qweight", Tensor.long), r"qweight is torch\.int64, want int32"),
    "qzeros float": (put(f"{UP}.qzeros", Tensor.float), r"qzeros is torch\.float32, want int32"),
    "scales int": (put(f"{UP}.scales", Tensor.int), r"scales is torch\.int32, want float16"),
    "g_idx float": (put(f"{UP}.g_idx", Tensor.half), r"g_idx is torch\.float16, want int32"),
    "qweight flat": (put(f"{UP}.qweight", Tensor.flatten), r"qweight has shape \[768\], want 2"),
    "qweight empty": (put(f"{UP}.qweight", lambda t: t[:0]), "holds no weights"),
    "qweight rows lost": (put(f"{UP}.qweight", lambda t: t[:-1]), r"g_idx has shape \[64\], want"),
    "8-bit words": (put(f"{UP}.qweight", lambda t: t.repeat(2, 1)), r"want \[128\] for 4-bit"),
    "odd columns": (put(f"{UP}.qweight", lambda t: t[:, :-1]), "95 output features"),
    "g_idx shorter": (put(f"{UP}.g_idx", lambda t: t[:-1]), r"g_idx has shape \[63\], want \[64\]"),
    "K not a multiple of 8": (
        tensors(lambda t: [t.update({f"{UP}.g_idx": torch.arange(60, dtype=torch.int32) // 32})]),
        r"g_idx has shape \[60\], want \[64\]",
    ),
    "group lost": (
        several(
            put(f"{UP}.scales", lambda t: t[:1]),
            put(f"{UP}.qzeros", lambda t: t[:1]),
        ),
        r"scales has shape \[1, 96\], want \[2, 96\].*group_size 32",
    ),
    "another group size": (config(group_size=64), r"scales has shape \[2, 96\], want \[1, 96\]"),
    "zeros of other width": (
        put(f"{UP}.qzeros", lambda t: t[:, :-1]),
        r"qzeros has shape \[2, "
        r"11\]",
    ),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias has shape \[63\]"),
    "g_idx negative": (
        poke(f"{UP}.g_idx", (5,), -1),
        r"0\.up: g_idx\[5\] is -1, want a group "
        "in 0",
    ),
    "g_idx too large": (poke(f"{UP}.g_idx", (7,), 2), r"g_idx\[7\] is 2, want a group in 0\.\.1"),
    "g_idx unbalanced": (
        poke(f"{UP}.g_idx", (0,), 1),
        "puts 31 features into group 0, want 32.*row-parallel slice",
    ),
    "g_idx all zero": (put(f"{UP}.g_idx", torch.zeros_like), "puts 64 features into group 0"),
    "zero not 8": (
        poke(f"{UP}.qzeros", (1, 2), 0x77777747),
        "says sym.*group 1, column 17 has 5",
    ),
    "zeros of version 2": (config(checkpoint_format="gptq_v2"), "group 0, column 0 has 7"),
    "scale NaN": (poke(f"{UP}.scales", (1, 3), float("nan")), r"up: scales.*nan.*\[1, 3\]"),
    "scale inf": (poke(f"{UP}.scales", (0, 9), float("inf")), r"up: scales.*inf.*\[0, 9\]"),
    "bias NaN": (poke(f"{DOWN}.bias", (4,), float("nan")), r"down: bias.*nan.*\[4\]"),
    "scales float32": (put(f"{UP}.scales", Tensor.float), "dtype=torch.float16"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("valid") / "src").directory


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, valid: Path, case: str) -> None:
    assert_refused(tmp_path, valid, *CASES[case])


def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: Path) -> None:
    def change(found: dict[str, Tensor]) -> None:
        found[f"{UP}.scales"][1, 3] = float("nan")
        found[f"{UP}.g_idx"][0] = 1
        found[f"{DOWN}.qzeros"][0, 0] = 0
        found.pop("model.layers.1.up.scales")

    assert len(refusals_of(tmp_path, valid, tensors(change))) == 4


def test_a_long_list_is_shortened_in_the_message_only() -> None:
    error = CheckpointError([f"reason {i}" for i in range(100)], where="somewhere")
    assert len(error.refusals) == 100
    assert str(error).startswith("somewhere: 100 problems\n  - reason 0\n")
    assert str(error).endswith("  - and 60 more")


def test_unreadable_files(tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission"):
        convert(valid, tmp_path / "dst", progress=False)


@pytest.mark.parametrize("source", ["absent", "file"])
def test_source_is_no_folder(tmp_path: Path, source: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"does not exist|is not a directory"):
        convert(tmp_path / source, tmp_path / "dst", progress=False)


@pytest.mark.parametrize("excluded_first", [True, False])
def test_layer_excluded_by_a_leading_minus_is_copied(tmp_path: Path, excluded_first: bool) -> None:
    """A rule that excludes goes first, wherever it stands; the module's plain weight is kept."""
    rules: dict[str, Any] = {"-:head": {}, ".*": {"bits": 4}}
    rules = rules if excluded_first else dict(reversed(rules.items()))
    others = {"head.weight": torch.randn(8, 8), "head.scales": torch.ones(3)}
    layers = {"a.b": make_layer(64, 64)}
    write_checkpoint(tmp_path / "src", layers, config=gptq_config(dynamic=rules), others=others)
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert [layer.name for layer in report.layers] == ["a.b"]
    assert report.other_tensors == 2


@pytest.mark.parametrize("sym", [False, None])
@pytest.mark.parametrize(("claimed", "right"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_symmetric_zeros_of_the_other_format(
    tmp_path: Path, sym: bool | None, claimed: str, right: str
) -> None:
    layers = {"a.b": make_layer(64, 64), "a.c": make_layer(96, 64)}
    config = gptq_config(sym=sym, checkpoint_format=claimed)
    version = 1 if right == "gptq" else 2
    write_checkpoint(tmp_path / "src", layers, config=config, version=version)
    with pytest.raises(CheckpointError, match=rf"checkpoint_format: every .* to '{right}' in"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    layers["a.c"].zeros[1, 5] = 3  # one other zero point, and it is what it says
    write_checkpoint(tmp_path / "other", layers, config=config, version=version)
    convert(tmp_path / "other", tmp_path / "dst", progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One act-order, asymmetric layer with a bias: a byte of each kind of tensor can be hit."""
    layer = make_layer(64, 8, 32, sym=False, act_order=True, bias=True)
    others = {"norm.weight": torch.ones(4)}
    root = tmp_path_factory.mktemp("small") / "src"
    return write_checkpoint(
        root, {"a.b": layer}, config=gptq_config(32, sym=False), others=others
    ).directory


FILES = CHANGES["file"]
FUZZ = settings(max_examples=200, deadline=None)


@FUZZ
@given(**CHANGES)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, small: Path, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), small, **change)


@FUZZ
@given(file=FILES, start=st.floats(0, 1), stop=st.floats(0, 1), inserted=st.binary(max_size=40))
def test_cut_and_inserted_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    small: Path,
    file: str,
    start: float,
    stop: float,
    inserted: bytes,
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(small, root / "src")
    data = (small / file).read_bytes()
    first, last = sorted((int(start * len(data)), int(stop * len(data))))
    (root / "src" / file).write_bytes(data[:first] + inserted + data[last:])
    assert_exact_or_refused(root)
    shutil.rmtree(root)


@FUZZ
@given(
    values=st.dictionaries(
        st.sampled_from(["bits", "group_size", "sym", "checkpoint_format", "dynamic", "meta"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
            max_leaves=4,
        ),
    )
)
def test_any_configuration(
    tmp_path_factory: pytest.TempPathFactory, small: Path, values: dict[str, Any]
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(small, root / "src")
    (root / "src" / "config.json").write_text(json.dumps(gptq_config(**{"sym": False, **values})))
    assert_exact_or_refused(root)
    shutil.rmtree(root)


def test_the_base_of_all_cases_is_valid(tmp_path: Path, valid: Path) -> None:
    convert(valid, tmp_path / "dst", progress=False)
    assert verify(tmp_path / "dst", valid, progress=False).equal
    assert len(default_layers()) == 3
