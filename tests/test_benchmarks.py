"""The command line of ``python -m benchmarks``: what it refuses, and what it says without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is not installed

from benchmarks import __main__ as command_line
from benchmarks import arguments, gemm, options, shapes, sweep


@pytest.mark.parametrize("text", ["", "4096", "4096x", "x4096", "0x64", "64x-1", "64X64", "1x2x3"])
def test_layers_that_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it must be NxK, as 4096x14336"):
        arguments.layer(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1,,2", "a"])
def test_numbers_that_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it must be a positive integer"):
        arguments.positives(text)


@pytest.mark.parametrize("module", [gemm, sweep, options])
def test_what_is_measured(module: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    assert parser.parse_args(["--shape", "64x128", "--shape", "8192x8192"]).shape == [
        (64, 128),
        (8192, 8192),
    ]
    assert parser.parse_args([]).shape is None


def test_points() -> None:
    everything = list(gemm.points(None, None))
    assert len(everything) == sum(map(len, shapes.GEMM_POINTS.values()))
    others = list(gemm.points(None, None, others=True))
    assert len(set(others)) == len(others) == 29 * 11
    assert list(gemm.points([(512, 4096)], None, others=True)) == others[27 * 11 : 28 * 11]
    assert list(gemm.points([(64, 128)], [2, 3])) == [(64, 128, 2), (64, 128, 3)]
    assert list(gemm.points([(6144, 4096)], None)) == [(6144, 4096, m) for m in (1, 16, 64)]


BAD = [(command, "--shape", "big") for command in ("gemm", "plans", "sweep", "options")]
BAD += [(command, "--m", "none") for command in ("gemm", "plans", "options")]
BAD += [("sweep", "--last", "0"), ("e2e", "--batch", "1,"), ("e2e", "--layers", "x")]


@pytest.mark.parametrize(("command", "name", "value"), BAD)
def test_bad_arguments_end_with_a_message(
    command: str,
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", command, name, value])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {name}: got " in error
    assert "; it must be" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only without a GPU")
@pytest.mark.parametrize("command", ["gemm", "plans", "sweep", "options", "e2e"])
def test_without_a_gpu(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", command])
    assert command_line.main() == 2
    assert f"benchmarks {command}: needs a CUDA device, found none" in capsys.readouterr().out
