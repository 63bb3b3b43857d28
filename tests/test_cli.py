"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import gptq_config, make_layer, write_checkpoint

from marlin.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src").directory


class TestConvert:
    def test_converts(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", str(source), str(tmp_path / "dst")]) == 0
        out, err = capsys.readouterr()
        assert "converted 3 layers (" in out
        assert "bits per weight) and copied 4 other tensors" in out
        assert f"written to {tmp_path / 'dst'}" in out
        assert err == ""  # no progress bar without a terminal
        assert (tmp_path / "dst" / "config.json").exists()

    def test_dry_run(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", str(source), str(tmp_path / "dst"), "--dry-run"]) == 0
        out = capsys.readouterr().out
        head, *rows, total = out.splitlines()
        columns = "layer K N group zeros order scales MB before after"
        assert head.split() == columns.split()
        assert [row.split()[:4] for row in rows] == [
            ["model.layers.0.down", "96", "64", "32"],
            ["model.layers.0.up", "64", "96", "32"],
            ["model.layers.1.up", "72", "40", "32"],
        ]
        assert "nothing was written" in total
        assert not (tmp_path / "dst").exists()

    def test_json(self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["convert", str(source), str(tmp_path / "dst"), "--shard-size", "5KB", "--json"]
        assert main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert [layer["in_features"] for layer in report["layers"]] == [96, 64, 72]
        assert len(report["shards"]) > 1
        assert report["copied_files"] == ["tokenizer.json", "tokenizer_config.json"]

    def test_refusals(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (source / "config.json").write_text(json.dumps(gptq_config(bits=8, group_size=20)))
        assert main(["convert", str(source), str(tmp_path / "dst")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("marlin: 2 problems\n  - ")
        assert "bits is 8" in err
        assert "group_size is 20" in err
        assert "Traceback" not in err

    def test_dtype_hint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        layer = make_layer(64, 64)
        layer.scales = layer.scales.float()
        write_checkpoint(tmp_path / "f32", {"a.b": layer})
        arguments = ["convert", str(tmp_path / "f32"), str(tmp_path / "dst")]
        assert main(arguments) == 2
        assert capsys.readouterr().err.endswith(
            "marlin: on the command line: --dtype float16 or --dtype bfloat16\n"
        )
        assert main([*arguments, "--dtype", "float16"]) == 0

    def test_existing_destination(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", str(source), str(tmp_path)]) == 2
        assert "exists and is not empty" in capsys.readouterr().err

    @pytest.mark.parametrize("size", ["0", "x", "-1GB", "nan", "1e999"])
    def test_bad_shard_size(self, size: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["convert", "a", "b", f"--shard-size={size}"])
        assert caught.value.code == 2
        assert "is not a size; write 2GB" in capsys.readouterr().err

    def test_system_errors(
        self,
        tmp_path: Path,
        source: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(*arguments: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.pwrite", full)
        assert main(["convert", str(source), str(tmp_path / "dst")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("marlin: [Errno 28] No space left on device: ")
        assert error.endswith("model.safetensors'\n")
        assert not (tmp_path / "dst").exists()

    def test_a_path_that_the_terminal_cannot_show(self, tmp_path: Path, source: Path) -> None:
        command = [sys.executable, "-m", "marlin", "convert", str(source), str(tmp_path / "d\xe4")]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "d\\xe4" in done.stdout
        assert (tmp_path / "d\xe4" / "config.json").exists()

    def test_interrupt(
        self,
        tmp_path: Path,
        source: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def interrupt(*arguments: Any) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.pwrite", interrupt)
        assert main(["convert", str(source), str(tmp_path / "dst")]) == 130
        assert capsys.readouterr().err == "marlin: interrupted\n"
        assert [path.name for path in tmp_path.iterdir()] == ["src"]


class TestVerify:
    @pytest.fixture
    def converted(self, tmp_path: Path, source: Path) -> Path:
        assert main(["convert", str(source), str(tmp_path / "dst"), "--json"]) == 0
        return tmp_path / "dst"

    def test_equal(self, converted: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["verify", str(converted), "--against", str(source)]) == 0
        out, err = capsys.readouterr()
        assert out.count(" equal\n") == 3
        assert "other files are not compared" in out
        assert err == ""

    def test_different(
        self, converted: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = converted / "model.safetensors"
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        data[start + header["model.layers.1.up.qweight"]["data_offsets"][0]] ^= 0x10
        path.write_bytes(data)
        capsys.readouterr()
        assert main(["verify", str(converted), "--against", str(source)]) == 1
        out, err = capsys.readouterr()
        assert out.splitlines()[3].split() == ["model.layers.1.up", "2880", "different"]
        assert err.startswith("marlin: different: model.layers.1.up: weight row ")
        assert main(["verify", str(converted), "--against", str(source), "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["equal"] is False
        assert [layer["problem"] is None for layer in report["layers"]] == [True, True, False]

    def test_refused(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(source), "--against", str(source)]) == 2
        assert "compared with itself; give the checkpoint" in capsys.readouterr().err


class TestPlan:
    @pytest.fixture
    def inspect(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def plan_for(m: int, n: int, k: int, **options: Any) -> dict[str, Any]:
            calls.append((m, n, k, options))
            if n % 2:
                raise ValueError("n must be even")
            kernel = {"name": "decode", "stages": 4, "reason": "few tokens"}
            return {"kernel": kernel, "blocks": 8}

        module = ModuleType("marlin._inspect")
        module.plan_for = plan_for  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "marlin._inspect", module)
        return calls

    def test_table(
        self, inspect: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = "plan --m 1,16 --n 64 --k 128 --sm 90 --sms 132"
        assert main(shlex.split(f"{sizes} --dtype bfloat16 --sparse")) == 0
        table = [" m  kernel  blocks", " 1  decode       8", "16  decode       8"]
        assert capsys.readouterr().out.splitlines() == [*table, "decode: few tokens"]
        options = {"group_size": 128, "bf16": True, "sparse": True, "sm": 90, "sms": 132}
        assert inspect == [(1, 64, 128, options), (16, 64, 128, options)]

    def test_json(self, inspect: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            main(shlex.split("plan --m 3 --n 64 --k 128 --group-size 32 --sm 90 --sms 132 --json"))
            == 0
        )
        (plan,) = json.loads(capsys.readouterr().out)
        assert (plan["m"], plan["kernel"]["stages"], plan["blocks"]) == (3, 4, 8)
        options = {"group_size": 32, "bf16": False, "sparse": False, "sm": 90, "sms": 132}
        assert inspect == [(3, 64, 128, options)]

    def test_refused(
        self, inspect: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(shlex.split("plan --m 3 --n 63 --k 128 --sm 90 --sms 132")) == 2
        assert capsys.readouterr().err == "marlin: plan: n must be even\n"

    @pytest.mark.parametrize("size", ["99999999999999999999", "0", "-1", "2147483648", "x", "²"])
    @pytest.mark.parametrize("name", ["m", "n", "k", "sm", "sms"])
    def test_size_out_of_range(
        self, name: str, size: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = {"m": "1", "n": "64", "k": "64", name: size}
        with pytest.raises(SystemExit) as caught:
            main(["plan", *(f"--{key}={value}" for key, value in sizes.items())])
        assert caught.value.code == 2
        assert f"--{name}: {size!r} is not a" in capsys.readouterr().err

    def test_without_a_gpu_one_must_be_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(shlex.split("plan --m 1 --n 64 --k 64 --sm 90")) == 2
        assert "--sm 90 --sms 132" in capsys.readouterr().err

    def test_module_missing(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "marlin._inspect", None)
        assert main(shlex.split("plan --m 1 --n 64 --k 64 --sm 90 --sms 132")) == 1
        assert "needs the compiled module marlin._inspect" in capsys.readouterr().err

    def test_the_real_module(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("marlin._inspect")
        assert main(shlex.split("plan --m 1,64 --n 8192 --k 8192 --sm 90 --sms 132 --json")) == 0
        assert [plan["m"] for plan in json.loads(capsys.readouterr().out)] == [1, 64]
        assert main(shlex.split("plan --m 1 --n 64 --k 64 --sm 80 --sms 108 --sparse --json")) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        assert plan["kernel"]["sparse"] is True

    def test_bad_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["plan", "--m", "1,x", "--n", "64", "--k", "64"])
        assert "is not a list of sizes" in capsys.readouterr().err


class TestEnv:
    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["torch"] == torch.__version__
        assert set(found) >= {"marlin", "build", "torch_cuda", "driver", "gpus", "python", "system"}

    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env"]) == 0
        assert f"torch       {torch.__version__}\n" in capsys.readouterr().out

    def test_never_fails(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> int:
            raise RuntimeError("no driver")

        monkeypatch.setattr(torch.cuda, "device_count", broken)
        monkeypatch.setitem(sys.modules, "marlin._inspect", None)
        assert main(["env"]) == 0
        out = capsys.readouterr().out
        assert "gpus        not available (RuntimeError: no driver)" in out
        assert "build       not available (ModuleNotFoundError" in out


def test_as_a_program(tmp_path: Path, source: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "marlin", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert run("convert", str(source), str(tmp_path / "dst")).returncode == 0
    assert run("verify", str(tmp_path / "dst"), "--against", str(source)).returncode == 0
    refused = run("convert", str(tmp_path / "absent"), str(tmp_path / "other"))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"marlin: {tmp_path / 'absent'}: does not exist")
    assert refused.stderr.count("\n") == 1
    assert run("nonsense").returncode == 2
    assert run("--version").stdout.startswith("marlin ")
