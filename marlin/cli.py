"""The ``marlin`` command: convert, export, verify, plan, env.

Exit codes: 0 done, 1 failed or different, 2 the input was refused or the command line is wrong, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from marlin._cli_output import print_conversion, print_plans, print_verification
from marlin.convert import SHARD_BYTES, ConversionReport, convert
from marlin.environment import environment
from marlin.export import TARGETS, export
from marlin.formats.checkpoint import CheckpointError
from marlin.formats.gptq_config import GROUP_SIZES
from marlin.verify import verify

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
LARGEST_SIZE = 2**31 - 1
CMAKE_DIR = Path(__file__).parent / "share" / "cmake" / "marlin"


def _size(text: str) -> int:
    """A number of bytes such as 2GB, 500MB or 1000."""
    upper = text.upper().replace(" ", "")
    unit = next((unit for unit in UNITS if upper.endswith(unit)), "")
    try:
        value = int(float(upper.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 2GB, 500MB or a number of bytes"
        )
    return value


def _sizes(text: str) -> list[int]:
    """A list such as 1,16,64."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if not all(0 < value <= LARGEST_SIZE for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of sizes from 1 to {LARGEST_SIZE}; write 16 or 1,16,64"
        )
    return values


def _count(text: str) -> int:
    """A size such as 4096."""
    value = int(text) if text.isdecimal() and len(text) < 11 else 0
    if not 0 < value <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {LARGEST_SIZE}")
    return value


def _run_convert(arguments: argparse.Namespace) -> int:
    report = convert(
        arguments.src,
        arguments.dst,
        dry_run=arguments.dry_run,
        progress=not arguments.json,
        dtype=DTYPES.get(arguments.dtype),
        shard_bytes=arguments.shard_size,
        sparse=arguments.sparse,
        require_sparse=arguments.require_sparse,
    )
    _print_report(report, arguments.json)
    return 0


def _run_export(arguments: argparse.Namespace) -> int:
    report = export(
        arguments.src,
        arguments.dst,
        format=arguments.format,
        dry_run=arguments.dry_run,
        progress=not arguments.json,
        dtype=DTYPES.get(arguments.dtype),
        shard_bytes=arguments.shard_size,
    )
    _print_report(report, arguments.json)
    return 0


def _print_report(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_conversion(report)


def _run_verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.dst, arguments.against, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_verification(report)
    return 0 if report.equal else 1


def _gpu(arguments: argparse.Namespace) -> dict[str, int] | None:
    """Compute capability (times ten) and multiprocessors: as given, else of the current device."""
    if arguments.sm is not None and arguments.sms is not None:
        return {"sm": arguments.sm, "sms": arguments.sms}
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "sm": arguments.sm or device.major * 10 + device.minor,
        "sms": arguments.sms or device.multi_processor_count,
    }


def _run_plan(arguments: argparse.Namespace) -> int:
    try:
        _inspect = import_module("marlin._inspect")
    except ImportError as error:
        print(
            f"marlin: `plan` needs the compiled module marlin._inspect ({error}): build the "
            "package with `pip install .`",
            file=sys.stderr,
        )
        return 1
    gpu = _gpu(arguments)
    if gpu is None:
        print(
            "marlin: plan: there is no CUDA device to plan for; name one, for example "
            "--sm 90 --sms 132 (an H200)",
            file=sys.stderr,
        )
        return 2
    try:
        plans: list[dict[str, Any]] = [
            {
                "m": m,
                **_inspect.plan_for(
                    m,
                    arguments.n,
                    arguments.k,
                    group_size=arguments.group_size,
                    bf16=arguments.dtype == "bfloat16",
                    sparse=arguments.sparse,
                    **gpu,
                ),
            }
            for m in arguments.m
        ]
    except (ValueError, RuntimeError) as error:
        print(f"marlin: plan: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(plans, indent=2, default=str))
    else:
        print_plans(plans)
    return 0


def _run_env(arguments: argparse.Namespace) -> int:
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = "; ".join(
                f"{g['name']} (sm_{g['capability'].replace('.', '')}, {g['sms']} SMs, "
                f"{g['memory_gib']} GiB)"
                for g in value
            )
        print(f"{key:12}{value or 'none'}")
    return 0


def _version() -> str:
    try:
        return metadata.version("marlin")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _add_rewrite_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", metavar="SRC", help="folder of the checkpoint; it is not changed")
    command.add_argument(
        "dst", metavar="DST", help="folder to create; it must not exist, or be empty"
    )
    command.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    command.add_argument(
        "--dtype", choices=DTYPES, help="dtype of scales and biases (default: theirs)"
    )
    command.add_argument(
        "--shard-size", type=_size, default=SHARD_BYTES, help="largest output file (default: 2GB)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlin", description="4-bit weights for fast matrix products."
    )
    parser.add_argument("--version", action="version", version=f"marlin {_version()}")
    parser.add_argument(
        "--cmake-dir",
        action="version",
        version=str(CMAKE_DIR),
        help="print the folder for CMake's find_package(marlin): -Dmarlin_DIR=...",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="convert a quantized checkpoint")
    _add_rewrite_arguments(command)
    command.add_argument(
        "--sparse", action="store_true", help="store layers whose weights are 2:4 as 2:4 sparse"
    )
    command.add_argument(
        "--require-sparse", action="store_true", help="the same, and refuse layers that are not"
    )
    command.set_defaults(run=_run_convert)

    command = commands.add_parser("export", help="turn a converted checkpoint back into GPTQ")
    _add_rewrite_arguments(command)
    command.add_argument(
        "--format", choices=TARGETS, default="gptq", help="what to write (default: gptq)"
    )
    command.set_defaults(run=_run_export)

    command = commands.add_parser(
        "verify", help="compare a converted or exported checkpoint with its source, exactly"
    )
    command.add_argument("dst", metavar="DST", help="the converted or exported checkpoint")
    command.add_argument(
        "--against", metavar="SRC", required=True, help="the checkpoint it was made from"
    )
    command.set_defaults(run=_run_verify)

    command = commands.add_parser("plan", help="show which kernel multiplies which sizes")
    command.add_argument("--m", type=_sizes, required=True, help="tokens, for example 1,16,64")
    command.add_argument("--n", type=_count, required=True, help="output features")
    command.add_argument("--k", type=_count, required=True, help="input features")
    command.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    command.add_argument("--dtype", choices=DTYPES, default="float16")
    command.add_argument("--sparse", action="store_true", help="the weight is 2:4 sparse")
    command.add_argument(
        "--sm", type=_count, help="compute capability, for example 90 (default: the GPU's)"
    )
    command.add_argument(
        "--sms", type=_count, help="number of multiprocessors (default: the GPU's)"
    )
    command.set_defaults(run=_run_plan)

    command = commands.add_parser("env", help="what a bug report needs to know about this machine")
    command.set_defaults(run=_run_env)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a stream of the caller's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CheckpointError as error:
        print(f"marlin: {error}", file=sys.stderr)
        for option in error.options:
            print(f"marlin: on the command line: {option}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError) as error:
        print(f"marlin: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("marlin: interrupted", file=sys.stderr)
        return 130
