"""Draws the results of ``gemm`` and ``e2e`` as SVG, over the tokens M or the batch."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h200"
VARIANT_LINES = {"fp16": ":", "marlin": "-", "marlin-24": "--"}

Point = tuple[str, int, float]  # name of a line, x, y


def load(path: Path) -> dict[str, Any]:
    """A results file."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def draw(
    points: Iterable[Point],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    legend: str,
    ratios: bool = True,
    title: str = "",
    styles: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """One line for each name; ratios have a line at 1, what is none a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "marlin"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    lines = defaultdict(list)
    for name, x, y in points:
        lines[name].append((x, y))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, line in lines.items():
        style = (styles or {}).get(name, {})
        axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=4, label=name, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if ratios:
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(0, None)
    else:
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(title=legend, fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def draw_gemm(rows: list[dict[str, Any]], results: Path) -> None:
    """share.svg and speedup.svg, and likewise of 2:4 sparse weights."""
    axes = {"xlabel": "tokens M", "legend": "layer N x K"}
    for variant, suffix in (("dense", ""), ("24", "_24")):
        some = [row for row in rows if row["variant"] == variant]
        for key, ylabel in (("share", "share of the floor"), ("speedup", "speedup over fp16")):
            points = [(f"{row['n']} x {row['k']}", row["m"], row[key]) for row in some]
            if points:
                draw(points, results / f"{key}{suffix}.svg", ylabel=ylabel, **axes)


def draw_e2e(data: dict[str, Any], results: Path) -> None:
    """e2e_speedup.svg and e2e_tokens.svg: decode, a colour for each model."""
    rows = [row for row in data["rows"] if row["phase"] == "decode"]
    partial = data["meta"].get("partial")
    models = list(dict.fromkeys(row["model"] for row in rows))
    axes = {
        "xlabel": "batch",
        "legend": "model and variant",
        "title": f"partial results: {partial}" if partial else "",
        "styles": {
            f"{model} {variant}": {"color": f"C{i}", "linestyle": line}
            for i, model in enumerate(models)
            for variant, line in VARIANT_LINES.items()
        },
    }
    for name, key, ylabel, ratios in (
        ("e2e_speedup", "speedup", "speedup over fp16", True),
        ("e2e_tokens", "tokens_per_s", "tokens generated per second", False),
    ):
        points = [
            (f"{row['model']} {row['variant']}", row["batch"], row[key])
            for row in rows
            if row[key] is not None and not (ratios and row["variant"] == "fp16")
        ]
        if points:
            draw(points, results / f"{name}.svg", ylabel=ylabel, ratios=ratios, **axes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks charts``."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where gemm.json and e2e.json are"
    )


def run(args: argparse.Namespace) -> int:
    """Draws what is there, beside it."""
    gemm, e2e = (args.results / name for name in ("gemm.json", "e2e.json"))
    if not gemm.exists() and not e2e.exists():
        print(f"benchmarks charts: neither gemm.json nor e2e.json in {args.results}")
        return 2
    if gemm.exists():
        draw_gemm(load(gemm)["rows"], args.results)
    if e2e.exists():
        draw_e2e(load(e2e), args.results)
    return 0
