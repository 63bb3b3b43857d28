"""Whole checkpoints: converted, verified, loaded; atomic against kill -9; bounded in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import (
    GptqLayer,
    assert_holds,
    awq_config,
    awq_tensors,
    ct_config,
    ct_tensors,
    gptq_config,
    gptq_tensors,
    make_layer,
    pack_zeros,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from conversions import any_layer, convert_exactly, is_symmetric
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import grown
from safetensors.torch import load_file

from marlin.convert import convert
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.verify import verify

ROOT = Path(__file__).parents[1]
DEMO = Path(__file__).parent / "data" / "demo"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_variant_is_exact(
    tmp_path: Path, group_size: int, act_order: bool, sym: bool, version: int, shards: int
) -> None:
    layers = {
        "a.b": make_layer(256, 64, group_size, sym=sym, act_order=act_order, bias=True),
        "a.c": make_layer(200, 72, group_size, sym=sym, act_order=False, dtype=torch.bfloat16),
    }
    packing = "gptq" if version == 1 else "gptq_v2"
    config = gptq_config(group_size, sym=sym, desc_act=act_order, checkpoint_format=packing)
    source = write_checkpoint(
        tmp_path / "src", layers, config=config, version=version, shards=shards
    )
    report = convert_exactly(tmp_path)
    assert_holds(tmp_path / "dst", source)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["a.b"].act_order is (act_order and group_size != -1)
    assert by_name["a.b"].zeros is not sym
    assert by_name["a.c"].dtype == "bfloat16"


@settings(max_examples=40, deadline=None)
@given(layer=any_layer(step=8), shard_bytes=st.integers(1, 20_000))
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory, layer: GptqLayer, shard_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    config = gptq_config(layer.group_size, sym=is_symmetric(layer))
    source = write_checkpoint(root / "src", {"m.x": layer}, config=config)
    convert_exactly(root, shard_bytes=shard_bytes)
    assert_holds(root / "dst", source)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, shard_bytes=4000)
    assert len(report.shards) > 2
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_after
    for name in source.layers:  # a layer's tensors stay together
        assert (
            len({file for key, file in index["weight_map"].items() if key.startswith(name + ".")})
            == 1
        )
    assert Checkpoint.open(tmp_path / "dst").files == report.shards
    assert_holds(tmp_path / "dst", source)


@pytest.mark.parametrize("length", range(1, 65, 7))
def test_tensors_are_aligned_in_the_file(tmp_path: Path, length: int) -> None:
    """The library maps the file, and the kernels read a layer in vectors of 16 bytes."""
    layers = {
        "m" * length: make_layer(64, 64, act_order=True),
        "n" * length: make_layer(72, 40, sym=False, bias=True),
    }
    others = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, dtype=torch.float64)}
    write_checkpoint(tmp_path / "src", layers, config=gptq_config(sym=False), others=others)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    path = tmp_path / "dst" / "model.safetensors"
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    for name, tensor in load_file(path).items():
        wanted = 64 if name.endswith("qweight") else tensor.element_size()
        assert tensor.data_ptr() % wanted == 0, name


def test_other_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src")
    root = source.directory
    (root / "quantize_config.json").write_text(json.dumps(source.config["quantization_config"]))
    (root / "pytorch_model.bin").write_bytes(b"weights")
    (root / ".gitattributes").write_text("")
    (root / "extra").mkdir()
    (root / "extra" / "chat.jinja").write_text("hello")
    os.mkfifo(root / "pipe")
    (root / "linked").symlink_to("extra")
    report = convert(root, tmp_path / "dst", progress=False)
    found = snapshot(tmp_path / "dst")
    assert found["tokenizer.json"] == b'{"version": "1.0"}'
    assert found["extra/chat.jinja"] == b"hello"
    assert set(report.skipped_files) == {".gitattributes", "linked/", "pipe", "pytorch_model.bin"}
    assert set(found) == {"config.json", "model.safetensors", *report.copied_files}
    config = json.loads(found["config.json"])
    assert config["model_type"] == "tiny"
    assert config["quantization_config"]["quant_method"] == "marlin"


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "src")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("tokenizer.json"))
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read; allow it"):
            convert(tmp_path / "src", tmp_path / "dst", progress=False, dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_links_as_in_a_model_cache(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "blobs")
    (tmp_path / "src").mkdir()
    for path in source.directory.iterdir():
        (tmp_path / "src" / path.name).symlink_to(f"../blobs/{path.name}")
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())
    assert_holds(tmp_path / "dst", source)


def test_dynamic_overrides(tmp_path: Path) -> None:
    layers = {
        "model.layers.0.up": make_layer(128, 64, 32, seed=1),
        "model.layers.1.up": make_layer(128, 64, 64, seed=2),
        "model.layers.1.down": make_layer(128, 64, -1, sym=False, seed=3),
    }
    config = gptq_config(
        32,
        dynamic={
            r"+:.*\.1\.down": {"q_group_size": -1, "sym": False},
            r".*\.1\..*": {"group_size": 64},
            r"-:.*\.2\..*": {},
        },
    )
    others = {"model.layers.2.up.weight": torch.randn(8, 8)}
    source = write_checkpoint(tmp_path / "src", layers, config=config, others=others)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    dry = convert(tmp_path / "src", tmp_path / "dst", dry_run=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    wet = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert (dry.layers, dry.bytes_after, dry.shards) == (wet.layers, wet.bytes_after, wet.shards)
    size = sum(info.nbytes for info in Checkpoint.open(tmp_path / "dst").tensors.values())
    assert size == wet.bytes_after


def test_float32_scales(tmp_path: Path) -> None:
    layer = make_layer(64, 64, bias=True)
    layer.scales = layer.scales.float()
    assert layer.bias is not None
    layer.bias = layer.bias.float()
    write_checkpoint(tmp_path / "src", {"a.b": layer})
    with pytest.raises(CheckpointError, match=r"scales: got float32.*dtype=torch\.float16"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    with pytest.raises(CheckpointError, match="must hold every element exactly"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False, dtype=torch.bfloat16)
    convert(tmp_path / "src", tmp_path / "dst", progress=False, dtype=torch.float16)
    assert read_all(tmp_path / "dst")["a.b.scales"].dtype == torch.float16
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal


def test_bias_is_rounded_only_on_request(tmp_path: Path) -> None:
    layer = make_layer(64, 64, bias=True)
    layer.bias = torch.full((64,), 1e-9, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "src", {"a.b": layer})
    with pytest.raises(CheckpointError, match=r"bias: got 9\..*pass dtype=torch\.float16 to round"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    convert(tmp_path / "src", tmp_path / "dst", progress=False, dtype=torch.float16)
    assert torch.equal(read_all(tmp_path / "dst")["a.b.bias"], torch.zeros(64).half())
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal
    tensors = read_all(tmp_path / "dst")
    tensors["a.b.bias"][7] = 1
    write_tensors(tmp_path / "dst", tensors)
    (problem,) = verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches
    assert problem == "a.b: bias column 7 is 1.0, want 0.0"


def test_dtypes_that_torch_lacks_are_copied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", others={})
    path = source.directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["odd.values"] = {"dtype": "F4", "shape": [3, 2], "data_offsets": [end, end + 3]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + b"\1\2\3")
    convert(source.directory, tmp_path / "dst", progress=False)
    converted = Checkpoint.open(tmp_path / "dst")
    assert b"".join(converted.read_bytes("odd.values")) == b"\1\2\3"
    assert verify(tmp_path / "dst", source.directory, progress=False).equal


def test_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has become act-order since it was examined: the header written no longer holds."""
    source = write_checkpoint(tmp_path / "src", {"a.b": make_layer(64, 64)})
    module = sys.modules["marlin.convert"]
    examine = module.survey  # type: ignore[attr-defined]

    def change_after(*arguments: Any) -> Any:
        found = examine(*arguments)
        changed = {**source.tensors, "a.b.g_idx": source.tensors["a.b.g_idx"].flip(0)}
        write_tensors(source.directory, changed)
        return found

    monkeypatch.setattr(module, "survey", change_after)
    with pytest.raises(CheckpointError, match=r"a\.b\.perm changed while it was converted"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("writer", ["other", "gptqmodel:5.6.0"])
def test_zero_points_of_zero(tmp_path: Path, writer: str) -> None:
    layer = make_layer(64, 64, sym=False)
    layer.zeros[1, 5] = 0
    config = gptq_config(sym=False, meta={"quantizer": [writer]})
    source = write_checkpoint(tmp_path / "src", {"a.b": layer}, config=config, others={})
    if writer != "other":  # it subtracts from whole words
        tensors = dict(source.tensors)
        tensors["a.b.qzeros"] = pack_zeros(layer.zeros, version=2) - 0x11111111
        write_tensors(source.directory, tensors)
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert ["tools differ" in text for text in report.warnings] == [True] * (writer == "other")


def test_warns_of_another_dtype_in_the_config(tmp_path: Path) -> None:
    config = {**gptq_config(), "torch_dtype": "bfloat16"}
    write_checkpoint(tmp_path / "src", config=config)
    (warning,) = convert(tmp_path / "src", tmp_path / "dst", dry_run=True, progress=False).warnings
    assert "bfloat16" in warning
    assert "float16: run" in warning


class TestDestination:
    def test_empty_folder_is_used(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "src")
        (tmp_path / "dst").mkdir()
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert_holds(tmp_path / "dst", source)

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("src", "source or inside"),
            ("src/dst", "source or inside"),
            ("full", "not empty"),
            ("file", "not a directory"),
            ("link", "symbolic link"),
            ("absent/dst", "create it first"),
            ("d" * 240, "too long a name by 1 bytes.*choose a shorter one"),
            ("d" * 300, "too long a name by 61 bytes.*choose a shorter one"),
            ("/", "/ is a mount point|/ exists and is not empty"),
        ],
    )
    def test_refused(self, tmp_path: Path, place: str, reason: str) -> None:
        write_checkpoint(tmp_path / "src")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("kept")
        (tmp_path / "file").write_text("kept")
        (tmp_path / "link").symlink_to("nowhere")
        before = snapshot(tmp_path)
        for dry_run in (True, False):
            with pytest.raises(CheckpointError, match=reason):
                convert(tmp_path / "src", tmp_path / place, progress=False, dry_run=dry_run)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("source", [".dst.marlin-partial", ".dst.marlin-partial/src"])
    def test_source_where_the_destination_is_staged(self, tmp_path: Path, source: str) -> None:
        """As by someone who rescues what a killed run has left."""
        (tmp_path / source).parent.mkdir(exist_ok=True)
        write_checkpoint(tmp_path / source)
        before = snapshot(tmp_path)
        with pytest.raises(CheckpointError, match=r"is emptied before .*dst is written; move the"):
            convert(tmp_path / source, tmp_path / "dst", progress=False)
        assert snapshot(tmp_path) == before

    def test_source_reached_by_a_link(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "src")
        (tmp_path / "alias").symlink_to("src")
        with pytest.raises(CheckpointError, match="source or inside"):
            convert(tmp_path / "alias", tmp_path / "src" / "dst", progress=False)

    def test_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path / "src")
        monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and Usage())
        with pytest.raises(CheckpointError, match=r"0\.00 GB free"):
            convert(tmp_path / "src", tmp_path / "dst", progress=False)

    def test_space_of_a_killed_run_counts_as_free(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write_checkpoint(tmp_path / "src")
        partial = tmp_path / ".dst.marlin-partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"x" * (2 << 20))

        def usage(path: object) -> Usage:
            found = Usage()
            found.free = 10 if partial.exists() and any(partial.iterdir()) else 2 << 20
            return found

        monkeypatch.setattr("shutil.disk_usage", usage)
        convert(tmp_path / "src", tmp_path / "dst", progress=False, dry_run=True)
        assert partial.exists()
        monkeypatch.setattr(Usage, "free", -(2 << 20))
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage())
        with pytest.raises(CheckpointError, match=r"dst\.marlin-partial holds and .*/dst needs"):
            convert(tmp_path / "src", tmp_path / "dst", progress=False, dry_run=True)
        monkeypatch.setattr("shutil.disk_usage", usage)
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert_holds(tmp_path / "dst", source)

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
    def test_folders_that_cannot_be_flushed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        write_checkpoint(tmp_path / "src")
        flush = os.fsync

        def refuse_folders(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            flush(descriptor)

        monkeypatch.setattr("os.fsync", refuse_folders)
        if code == errno.EIO:
            with pytest.raises(OSError, match=os.strerror(code)):
                convert(tmp_path / "src", tmp_path / "dst", progress=False)
        else:
            convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert (tmp_path / "dst").exists() == (code != errno.EIO)

    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def test_folders_that_cannot_be_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        write_checkpoint(tmp_path / "src")

        def refuse(descriptor: int, how: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.raises(OSError, match=r"cannot lock files .*convert into a folder on another"):
            convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["src"]

    def test_disk_full_midway(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path / "src")

        def full(descriptor: int, data: bytes, position: int) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device.*model\.safetensors"):
            convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["src"]

    def test_two_runs_at_once(self, tmp_path: Path) -> None:
        from marlin.formats.staging import staged_directory

        write_checkpoint(tmp_path / "src")
        with staged_directory(tmp_path / "dst") as partial:
            (partial / "x").write_text("of the first run")
            with pytest.raises(CheckpointError, match="another conversion"):
                convert(tmp_path / "src", tmp_path / "dst", progress=False)
        assert snapshot(tmp_path / "dst") == {"x": b"of the first run"}


class Usage:
    free = 10


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "marlin", *map(str, arguments)]


def test_kill_leaves_all_or_nothing(tmp_path: Path) -> None:
    layers = {f"m.{i}": make_layer(512, 512, act_order=True, seed=i) for i in range(12)}
    source = write_checkpoint(tmp_path / "src", layers, shards=3)
    before = snapshot(tmp_path / "src")
    destination = tmp_path / "dst"
    partial = tmp_path / ".dst.marlin-partial"
    command = _command("convert", tmp_path / "src", destination, "--shard-size", "300KB")
    interrupted = 0
    for attempt in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (partial.exists() and any(partial.iterdir())):
            time.sleep(0.001)
        time.sleep(0.02 * attempt)  # the first is killed at once
        process.kill()
        process.wait(timeout=60)
        assert snapshot(tmp_path / "src") == before
        if destination.exists():
            assert_holds(destination, source)
            shutil.rmtree(destination)
        else:
            interrupted += 1
    assert interrupted
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert_holds(destination, source)
    assert verify(destination, tmp_path / "src", progress=False).equal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("step", ["mkdir", "header", "layer", "config", "rename"])
def test_kill_at_each_step(tmp_path: Path, step: str) -> None:
    """The same at chosen moments: the process kills itself on entering a step."""
    places = {
        "mkdir": ("marlin.rewrite.Rewrite", "_write_all"),
        "header": ("marlin.rewrite", "_write_layer"),
        "layer": ("marlin.rewrite", "write_index"),
        "config": ("marlin.rewrite", "write_file"),
        "rename": ("pathlib.Path", "rename"),
    }
    source = write_checkpoint(tmp_path / "src")
    place, name = places[step]
    code = (
        "import os, sys, pathlib\n"
        "import marlin.rewrite\n"
        "from marlin.convert import convert\n"
        f"place = {place}\n"
        f"place.{name} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "convert(sys.argv[1], sys.argv[2], shard_bytes=4000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "dst")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "dst").exists()
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def marlin_24_tensors(layer: GptqLayer) -> dict[str, torch.Tensor]:
    """Any integers, at the first two of every four places."""
    return {
        "weight_packed": gptq_tensors(layer)["qweight"].view(-1)[::2].reshape(64, 4096),
        "scale_packed": layer.scales,
        "meta": torch.full((64, 4096), 0x4444, dtype=torch.int16),
    }


@pytest.mark.parametrize(
    ("config", "tensors_of", "limit"),
    [
        (gptq_config(128), gptq_tensors, 60),
        (awq_config(128), awq_tensors, 60),
        (ct_config(128), partial(ct_tensors, zeros="none"), 60),
        (ct_config(128, format="marlin-24"), marlin_24_tensors, 80),  # its weights are unpacked
    ],
    ids=["gptq", "awq", "pack-quantized", "marlin-24"],
)
def test_memory_is_bounded_by_a_layer(
    tmp_path: Path,
    config: dict[str, Any],
    tensors_of: Callable[[GptqLayer], dict[str, torch.Tensor]],
    limit: int,
) -> None:
    """24 layers of 2 MB in one file: the peak grows by a few layers, not by the file."""
    layers = dict.fromkeys([f"m.{i}" for i in range(24)], make_layer(2048, 2048, 128))
    others = {"embed.weight": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}
    write_checkpoint(tmp_path / "src", layers, config=config, others=others, tensors_of=tensors_of)
    peak = grown("marlin.convert(source, target)", tmp_path / "src", tmp_path / "dst")
    assert peak < limit  # the source has at least 98 MiB


@pytest.mark.parametrize("name", ["gptq-g128", "gptq-g64-actorder"])
def test_checkpoint_of_a_third_party(tmp_path: Path, name: str) -> None:
    """Made by GPTQModel, not by this repository's own generator."""
    if not (DEMO / name).is_dir():
        pytest.skip(f"tests/data/demo/{name} is not there")
    before = snapshot(DEMO / name)
    report = convert(DEMO / name, tmp_path / "dst", progress=False)
    assert report.layers
    assert {layer.group_size for layer in report.layers} == {128 if "g128" in name else 64}
    assert any(layer.act_order for layer in report.layers) is ("actorder" in name)
    result = verify(tmp_path / "dst", DEMO / name, progress=False)
    assert result.equal, result.mismatches
    assert snapshot(DEMO / name) == before
    config = json.loads((DEMO / name / "config.json").read_text())["quantization_config"]
    minus_one = config.get("checkpoint_format", "gptq") == "gptq"
    source, packed = read_all(DEMO / name), read_all(tmp_path / "dst")
    for layer in report.layers:  # the weight by arithmetic that shares no code with the converter
        want = _by_definition(source, layer.name, minus_one)
        got = reference.dequantize64(
            packed[f"{layer.name}.qweight"],
            packed[f"{layer.name}.scales"],
            packed.get(f"{layer.name}.zeros"),
            packed.get(f"{layer.name}.perm"),
            layer.in_features,
        )
        assert torch.equal(got, want.weight())


def _by_definition(tensors: dict[str, torch.Tensor], name: str, minus_one: bool) -> GptqLayer:
    shifts = 4 * torch.arange(8)
    qweight, qzeros = tensors[f"{name}.qweight"].long(), tensors[f"{name}.qzeros"].long()
    q = ((qweight[:, None, :] >> shifts[:, None]) & 15).flatten(0, 1).T
    zeros = (((qzeros[:, :, None] >> shifts) & 15).flatten(1) + minus_one) & 15
    return GptqLayer(q, zeros, tensors[f"{name}.scales"], tensors[f"{name}.g_idx"], 0)
