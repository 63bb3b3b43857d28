"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks import charts, e2e, gemm, options, plans, sweep

COMMANDS = {
    "gemm": gemm,
    "plans": plans,
    "sweep": sweep,
    "options": options,
    "e2e": e2e,
    "charts": charts,
}


def main() -> int:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__))
    args = parser.parse_args()
    runs_anywhere = args.command == "charts" or getattr(args, "tiny", False)
    if not runs_anywhere and not torch.cuda.is_available():
        print(f"benchmarks {args.command}: needs a CUDA device, found none")
        return 2
    torch.manual_seed(0)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
