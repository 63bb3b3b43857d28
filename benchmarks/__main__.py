"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys

from benchmarks import gemm


def main() -> int:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    gemm.add_arguments(commands.add_parser("gemm", help=gemm.__doc__))
    return gemm.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
