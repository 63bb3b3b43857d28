"""2:4 sparse layers in whole checkpoints: converted, verified, loaded, and refused when damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import (
    GptqLayer,
    Source,
    gptq_config,
    make_layer,
    make_sparse,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from conversions import model_of
from memory import grown
from torch import Tensor

from marlin import MarlinLinear, MarlinLinear24, load
from marlin.cli import main
from marlin.convert import convert
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.verify import verify

ROOT = Path(__file__).parents[1]
SPARSE, DENSE, ORDERED = "model.sparse", "model.dense", "model.ordered"


def mixed_layers() -> dict[str, GptqLayer]:
    return {
        SPARSE: make_sparse(200, 72, sym=False, bias=True, seed=1),
        DENSE: make_layer(64, 64, seed=2),
        ORDERED: make_sparse(64, 64, act_order=True, seed=3),
    }


def write_mixed(directory: Path, **options: Any) -> Source:
    return write_checkpoint(directory, mixed_layers(), config=gptq_config(sym=None), **options)


def stored_weight(tensors: dict[str, Tensor], name: str, layer: GptqLayer) -> Tensor:
    """The weight of a stored sparse layer in fp64, by the tests' own unpacking."""
    n, k = layer.q.shape
    survivors = reference.unpack(tensors[f"{name}.qweight"], n, k // 2)
    places = reference.places_of(tensors[f"{name}.places"], n, k)
    group = reference.group_of_column(k, tensors[f"{name}.scales"].size(0))
    zeros = tensors.get(f"{name}.zeros")
    zero = torch.tensor(8) if zeros is None else zeros[group].T.long()
    q = zero.expand(n, k).reshape(n, k // 4, 4).clone()
    q.scatter_(2, places, survivors.view(n, k // 4, 2).long())
    weight = (q.view(n, k) - zero).double()
    return weight * tensors[f"{name}.scales"].double()[group].T


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_variant_is_exact(tmp_path: Path, group_size: int, sym: bool, shards: int) -> None:
    layers = {
        "a.b": make_sparse(256, 64, group_size, sym=sym, bias=True),
        "a.c": make_sparse(200, 72, group_size, sym=sym, dtype=torch.bfloat16),
    }
    config = gptq_config(group_size, sym=sym)
    source = write_checkpoint(tmp_path / "src", layers, config=config, shards=shards)
    before = snapshot(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert snapshot(tmp_path / "src") == before
    assert [(layer.sparse, layer.dense_reason) for layer in report.layers] == [(True, "")] * 2
    tensors = read_all(tmp_path / "dst")
    for name, layer in source.layers.items():
        assert torch.equal(stored_weight(tensors, name, layer), layer.weight())
    quantization = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == 2
    assert quantization["modules"]["a.c"] == {
        "in_features": 200, "out_features": 72, "group_size": group_size, "sparsity": "2:4",
    }  # fmt: skip
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    again = convert(tmp_path / "src", tmp_path / "all", progress=False, require_sparse=True)
    assert again.bytes_after == report.bytes_after


def test_mixed_checkpoint(tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "src")
    dense = convert(tmp_path / "src", tmp_path / "dense", progress=False)
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert report.bytes_after < dense.bytes_after
    assert report.warnings == dense.warnings
    by_name = {layer.name: layer for layer in report.layers}
    assert {name: layer.sparse for name, layer in by_name.items()} == {
        SPARSE: True, DENSE: False, ORDERED: False,
    }  # fmt: skip
    assert by_name[SPARSE].dense_reason == ""
    assert re.match(
        r"weight: got [34] weights other than zero in row 0, columns \d+\.\.\d+ \(the first of",
        by_name[DENSE].dense_reason,
    )
    assert by_name[ORDERED].dense_reason.startswith("g_idx: got act-order")
    assert all(layer.dense_reason == "" for layer in dense.layers)  # it was not asked for
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    for start in ("cpu", "meta"):
        with torch.device(start):
            model = model_of(source)
        for name, tensor in source.others.items():
            model.get_submodule("model").register_buffer(name.split(".")[1], tensor.clone())
        others = {f"model.{name.split('.')[1]}": t for name, t in source.others.items()}
        tensors = {n: t for n, t in read_all(tmp_path / "dst").items() if n not in source.others}
        root = tmp_path / start
        shutil.copytree(tmp_path / "dst", root)
        write_tensors(root, {**tensors, **others})
        load(model, root)
        for name, layer in source.layers.items():
            module = model.get_submodule(name)
            assert type(module) is (MarlinLinear24 if name == SPARSE else MarlinLinear)
            assert torch.equal(module.dequantize(), layer.weight().half())
            x = torch.randn(5, layer.q.size(1)).half()
            bias = 0 if layer.bias is None else layer.bias.double()
            want = x.double() @ layer.weight().T + bias
            torch.testing.assert_close(module(x).double(), want, rtol=2e-3, atol=4e-3)
        load(model, root)  # a sparse layer is replaced again


def test_without_being_asked_nothing_is_sparse(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", {"a.b": make_sparse(64, 64)})
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert not report.layers[0].sparse
    assert "a.b.places" not in read_all(tmp_path / "dst")
    config = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1


def test_no_sparse_layer_at_all_is_a_warning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", {"a.b": make_layer(64, 64)})
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert ["no layer is 2:4 sparse" in text for text in report.warnings] == [True]


def test_required_layers_are_refused_with_every_reason(tmp_path: Path) -> None:
    write_mixed(tmp_path / "src")
    before = snapshot(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "src", tmp_path / "dst", progress=False, require_sparse=True,
                    dry_run=dry_run)  # fmt: skip
        reasons = sorted(caught.value.refusals)
        assert len(reasons) == 2
        assert reasons[0].startswith(f"{DENSE}: weight: got")
        assert reasons[1].startswith(f"{ORDERED}: g_idx: got act-order")
    assert snapshot(tmp_path) == before


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_mixed(tmp_path / "src")
    dry = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    wet = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert (dry.layers, dry.bytes_after, dry.shards) == (wet.layers, wet.bytes_after, wet.shards)
    size = sum(info.nbytes for info in Checkpoint.open(tmp_path / "dst").tensors.values())
    assert size == wet.bytes_after


def test_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no longer 2:4 when it is packed."""
    source = write_checkpoint(tmp_path / "src", {"a.b": make_sparse(64, 64)})
    module = sys.modules["marlin.convert"]
    examine = module.survey  # type: ignore[attr-defined]

    def change_after(*arguments: Any) -> Any:
        found = examine(*arguments)
        changed = {**source.tensors, "a.b.qweight": torch.zeros(8, 64, dtype=torch.int32)}
        write_tensors(source.directory, changed)
        return found

    monkeypatch.setattr(module, "survey", change_after)
    with pytest.raises(CheckpointError, match=r"a\.b: weight: got 4 weights other than zero"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_kill_while_a_layer_is_thinned_out(tmp_path: Path) -> None:
    write_mixed(tmp_path / "src")
    code = (
        "import os, sys\n"
        "from marlin.convert import convert\n"
        "module = sys.modules['marlin.convert']\n"
        "module.sparsify = lambda *a: os.kill(os.getpid(), 9)\n"
        "convert(sys.argv[1], sys.argv[2], sparse=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "dst")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "dst").exists()
    convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_memory_is_bounded_by_a_layer(tmp_path: Path) -> None:
    """24 layers of 2 MB in one file: weights are unpacked, but of one layer at a time."""
    layer = make_sparse(2048, 2048, 128)
    others = {"embed.weight": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}
    write_checkpoint(tmp_path / "src", {f"m.{i}": layer for i in range(24)}, others=others)
    call = "marlin.convert(source, target, require_sparse=True)"
    peak = grown(call, tmp_path / "src", tmp_path / "dst")
    assert peak < 90  # the source has 112 MiB


class TestVerify:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        write_mixed(tmp_path / "src")
        convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
        return tmp_path / "dst", tmp_path / "src"

    @pytest.mark.parametrize(
        ("leaf", "change", "says"),
        [
            ("qweight", lambda t: t.view(-1)[0].bitwise_xor_(1 << 2),
             r"weight row 0, column \d is \d+, want \d+"),
            ("places", lambda t: t.view(-1)[0].copy_(0), r"places: got 0x00000000 at \[0, 0, 0\]"),
            ("scales", lambda t: t.view(-1)[0].add_(1), r"scales row 0 \(group\), column 0"),
            ("zeros", lambda t: t.view(-1)[0].bitwise_xor_(1), r"zeros row 0 \(group\), column 0"),
            ("bias", lambda t: t[0].add_(1), r"bias column 0"),
        ],
    )  # fmt: skip
    def test_a_change_is_found(
        self, pair: tuple[Path, Path], leaf: str, change: Callable[[Tensor], object], says: str
    ) -> None:
        tensors = read_all(pair[0])
        change(tensors[f"{SPARSE}.{leaf}"])
        write_tensors(pair[0], tensors)
        found = verify(*pair, progress=False).mismatches
        # a weight that is not stored has the code of its zero point, and differs with it
        assert len(found) == (2 if leaf == "zeros" else 1)
        assert re.match(rf"model\.sparse: {says}", found[-1]), found

    def test_a_weight_at_another_place_is_found(self, pair: tuple[Path, Path]) -> None:
        """Row 3's first quad: two weights, moved to the two places that were not stored."""
        tensors = read_all(pair[0])
        word = tensors[f"{SPARSE}.places"][0, 0]
        index = 3 * 4 * 2  # thread 12: row 3, columns 0..15
        low = int(word[index]) & 15
        others = [place for place in range(4) if place not in (low & 3, low >> 2)]
        word[index] = int(word[index]) & ~15 | others[0] | others[1] << 2
        write_tensors(pair[0], tensors)
        found = verify(*pair, progress=False).mismatches
        assert found[0].startswith("model.sparse: weight row 3, column ")

    def test_another_source(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        """Dense weights under a sparse conversion differ, and are not refused."""
        layers = mixed_layers()
        layers[SPARSE] = make_layer(200, 72, sym=False, bias=True, seed=1)
        write_checkpoint(tmp_path / "other", layers, config=gptq_config(sym=None))
        report = verify(pair[0], tmp_path / "other", progress=False)
        assert any(text.startswith("model.sparse: weight row") for text in report.mismatches)


Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]


def module(name: str, **changes: Any) -> Damage:
    return lambda config, tensors: config["modules"][name].update(changes)


def drop(name: str) -> Damage:
    return lambda config, tensors: tensors.pop(name)


def put(name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Damage:
    return lambda config, tensors: tensors.update({name: make(tensors)})


HOSTILE: dict[str, tuple[Damage, str]] = {
    "version 1": (
        lambda config, tensors: config.update(format_version=1),
        r"modules\['model\.sparse'\] has sparsity '2:4'.*from format_version 2 on",
    ),
    "version 3": (lambda config, tensors: config.update(format_version=3), "is 3; .*reads 1 and 2"),
    "version true": (
        lambda config, tensors: config.update(format_version=True),
        r"format_version is True",
    ),
    "another sparsity": (module(SPARSE, sparsity="4:8"), r"sparsity '4:8'; .* reads '2:4'"),
    "sparsity of another type": (module(SPARSE, sparsity=[2, 4]), r"has sparsity \[2, 4\]"),
    "features not in fours": (module(SPARSE, in_features=198), "198, which is not a multiple of 4"),
    "said to be dense": (
        module(SPARSE, sparsity=None),
        r"model\.sparse: has places, which a dense layer",
    ),
    "dense said to be sparse": (
        module(DENSE, sparsity="2:4"),
        r"model\.dense: places is missing",
    ),
    "ordered said to be sparse": (
        module(ORDERED, sparsity="2:4"),
        r"model\.ordered: has perm, which a 2:4 sparse layer",
    ),
    "places missing": (drop(f"{SPARSE}.places"), r"model\.sparse: places is missing"),
    "qweight missing": (drop(f"{SPARSE}.qweight"), r"model\.sparse: qweight is missing"),
    "places of another shape": (
        put(f"{SPARSE}.places", lambda t: t[f"{SPARSE}.places"][:, :1].contiguous()),
        r"places is I32 \[2, 1, 256\], want I32 \[2, 2, 256\]",
    ),
    "places of another dtype": (
        put(f"{SPARSE}.places", lambda t: t[f"{SPARSE}.places"].long()),
        r"places is I64 \[2, 2, 256\], want I32",
    ),
    "qweight of a dense layer": (
        put(f"{SPARSE}.qweight", lambda t: torch.zeros(2, 4, 512, dtype=torch.int32)),
        r"qweight is I32 \[2, 4, 512\], want I32 \[2, 2, 512\]",
    ),
    "places beside a dense layer": (
        put(f"{DENSE}.places", lambda t: torch.zeros(1, 1, 256, dtype=torch.int32)),
        r"model\.dense: has places, which a dense layer",
    ),
}  # fmt: skip
DAMAGED: dict[str, tuple[Damage, str]] = {
    "places that fall": (
        put(f"{SPARSE}.places", lambda t: t[f"{SPARSE}.places"] & ~0xF | 0b0001),
        r"model\.sparse: places: got 0x.*1 at \[0, 0, 0\]; .*must rise.*damaged",
    ),
    "equal places": (
        put(f"{SPARSE}.places", lambda t: torch.zeros_like(t[f"{SPARSE}.places"])),
        r"places: got 0x00000000",
    ),
    "zeros": (put(f"{SPARSE}.zeros", lambda t: t[f"{SPARSE}.zeros"] + 16), r"zeros holds"),
    "scales": (put(f"{SPARSE}.scales", lambda t: t[f"{SPARSE}.scales"] / 0), r"not finite"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("valid")
    write_mixed(root / "src", others={})
    convert(root / "src", root / "dst", progress=False, sparse=True)
    return root


@pytest.mark.parametrize("case", [*HOSTILE, *DAMAGED])
def test_damaged_conversions_are_refused(tmp_path: Path, valid: Path, case: str) -> None:
    damage, reason = (HOSTILE | DAMAGED)[case]
    shutil.copytree(valid, tmp_path / "all")
    directory = tmp_path / "all" / "dst"
    config, tensors = json.loads((directory / "config.json").read_text()), read_all(directory)
    damage(config["quantization_config"], tensors)
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory, tensors)
    source = Source(directory, mixed_layers(), {})
    model = model_of(source)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(CheckpointError) as caught:
        load(model, directory)
    assert re.search(reason, str(caught.value), re.DOTALL), str(caught.value)
    if case in HOSTILE:
        assert {name: id(module) for name, module in model.named_modules()} == before
        with pytest.raises(CheckpointError):
            verify(directory, tmp_path / "all" / "src", progress=False)


class TestCommandLine:
    def test_reports_what_is_sparse(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_mixed(tmp_path / "src")
        command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--sparse"]
        assert main([*command, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].split()[-1] == "weights"
        rows = {row.split()[0]: row.split()[-1] for row in out.splitlines()[1:4]}
        assert rows == {SPARSE: "2:4", DENSE: "dense", ORDERED: "dense"}
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert "2:4 sparse: 1 of 3 layers\n" in out
        assert "dense: model.ordered: g_idx: got act-order" in out
        assert err == ""
        assert main(["verify", str(tmp_path / "dst"), "--against", str(tmp_path / "src")]) == 0
        assert "holds exactly" in capsys.readouterr().out

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mixed(tmp_path / "src")
        command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--sparse", "--json"]
        assert main(command) == 0
        layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
        assert layers[SPARSE]["sparse"] is True
        assert layers[DENSE]["dense_reason"].startswith("weight: got")

    def test_required(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mixed(tmp_path / "src")
        command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--require-sparse"]
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "2 problems" in err
        assert err.endswith(
            "marlin: on the command line: --sparse in place of --require-sparse leaves such layers "
            "dense\n"
        )
        assert not (tmp_path / "dst").exists()
