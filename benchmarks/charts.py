"""Draws the results of ``gemm`` as SVG: the share of the floor, and the speedup, over M."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h200"


def load(path: Path) -> dict[str, Any]:
    """A results file."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def draw(rows: list[dict[str, Any]], key: str, label: str, path: Path) -> None:
    """One line per layer of ``key`` over M."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "marlin"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    layers = defaultdict(list)
    for row in rows:
        layers[f"{row['n']} x {row['k']}"].append((row["m"], row[key]))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in layers.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="tokens M", ylabel=label, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda m, _: f"{m:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(title="layer N x K", fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks charts``."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="where gemm.json is")


def run(args: argparse.Namespace) -> int:
    """Writes share.svg and speedup.svg beside gemm.json, and likewise of 2:4 sparse weights."""
    rows = load(args.results / "gemm.json")["rows"]
    for variant, suffix in (("dense", ""), ("24", "_24")):
        some = [row for row in rows if row["variant"] == variant]
        if some:
            draw(some, "share", "share of the floor", args.results / f"share{suffix}.svg")
            draw(some, "speedup", "speedup over fp16", args.results / f"speedup{suffix}.svg")
    return 0
