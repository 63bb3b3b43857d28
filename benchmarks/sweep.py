"""Times every M of a range: one token more should never cost much more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import gemm, meta
from benchmarks.arguments import layer, positive

DEFAULT_SHAPES = [(8192, 8192), (4096, 14336)]  # N x K
METHOD = (
    "time per call inside one CUDA graph that walks over at least 320 MB of distinct weights (cold "
    "L2), several times where that takes less than 1 ms; random weights and activations, "
    "static_weights=True, group 128, fp16, median of 7 replays of the graph, each timed by itself, "
    "CUDA events"
)


def steepest(us: dict[int, float]) -> tuple[float, int]:
    """The largest ratio of the time of M + 1 tokens to that of M, and that M."""
    return max((us[m + 1] / us[m], m) for m in us if m + 1 in us)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks sweep``."""
    parser.add_argument("--shape", type=layer, action="append", metavar="NxK", help="may repeat")
    parser.add_argument("--last", type=positive, default=512, help="the largest M")
    parser.add_argument("--commit", help="what to record, where the checkout has no git history")
    parser.add_argument("--json", type=Path, help="where to write the results")


def run(args: argparse.Namespace) -> int:
    """Measures, prints every 16th M and the steepest step, and writes the JSON if asked to."""
    results = {}
    for n, k in args.shape or DEFAULT_SHAPES:
        shape = f"{n}x{k}"
        us = gemm.marlin_us_of_each(n, k, range(1, args.last + 1))
        results[shape] = {str(m): round(t, 2) for m, t in us.items()}
        for m in us:
            if m % 16 in (0, 1):
                print(f"{shape} M = {m:4}: {us[m]:8.2f} us")
        ratio, at = steepest(us)
        print(f"{shape}: the steepest step is {ratio:.3f}, from M = {at} to {at + 1}", flush=True)
        torch.cuda.empty_cache()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"meta": meta.describe(args.commit, METHOD), "us": results}, indent=1)
        args.json.write_text(text + "\n")
    return 0
