"""Times what a layer may be besides fp16, symmetric, in groups of 128, against that."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import gemm, meta, sweep, timing
from benchmarks.arguments import layer, positives

OPTIONS = {  # group size, dtype, whether with zero points; what the others compare with first
    "group 128": (128, torch.float16, False),
    "group 64": (64, torch.float16, False),
    "group 32": (32, torch.float16, False),
    "one group": (-1, torch.float16, False),
    "asymmetric": (128, torch.float16, True),
    "bfloat16": (128, torch.bfloat16, False),
}
DEFAULT_M = (1, 16, 64, 128, 256, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks options``."""
    parser.add_argument("--variant", choices=("dense", "24"), default="dense")
    parser.add_argument("--shape", type=layer, action="append", metavar="NxK", help="may repeat")
    parser.add_argument("--m", type=positives, default=DEFAULT_M, help="tokens, e.g. 1,16")
    parser.add_argument("--commit", help="what to record, where the checkout has no git history")
    parser.add_argument("--json", type=Path, help="where to write the results")


def run(args: argparse.Namespace) -> int:
    """Measures, prints each time and its ratio to the first option's, writes the JSON if asked."""
    print(f"{'N x K':>14} {'M':>5}", *(f"{name:>16}" for name in OPTIONS))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for n, k in args.shape or sweep.DEFAULT_SHAPES:
        shape = f"{n}x{k}"
        for m in args.m:
            us = {}
            for name, (group_size, dtype, zeros) in OPTIONS.items():
                calls = gemm.marlin_calls(args.variant, n, k, m, group_size, dtype, zeros)
                us[name] = round(timing.measure(calls, sustained=False, rest_s=0.02).us, 2)
                del calls
                torch.cuda.empty_cache()
            results.setdefault(shape, {})[str(m)] = us
            first = us[next(iter(OPTIONS))]
            cells = (f"{value:8.2f} ({value / first:4.2f}x)" for value in us.values())
            print(f"{shape:>14} {m:>5}", *(f"{cell:>16}" for cell in cells), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        method = sweep.METHOD.replace("group 128, fp16", args.variant)
        text = json.dumps({"meta": meta.describe(args.commit, method), "us": results}, indent=1)
        args.json.write_text(text + "\n")
    return 0
