"""Times ``torch.ops.marlin.gemm`` beside cuBLAS fp16 and writes the results as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import marlin  # noqa: F401 - loads the ops
from benchmarks import meta, shapes, timing

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """One point: times in microseconds, ``share`` of the floor, ``speedup`` over cuBLAS fp16."""

    variant: str
    dtype: str
    n: int
    k: int
    m: int
    group: int
    us: float
    cublas_us: float
    floor_us: float
    share: float
    speedup: float


def random_weights(
    n: int, k: int, group_size: int, dtype: torch.dtype, zeros: bool
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """As many distinct (qweight, scales, zeros) as make a walk over them cold."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    blocks = (-(-n // 64), -(-k // 64), 512)

    def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        qweight = torch.randint(-(2**31), 2**31, blocks, device="cuda", dtype=torch.int32)
        scales = torch.rand(groups, n, device="cuda").mul_(0.01).to(dtype)
        z = torch.randint(0, 16, (groups, n), device="cuda", dtype=torch.uint8) if zeros else None
        return qweight, scales, z

    return [make() for _ in range(timing.copies_for(n * k // 2))]


def marlin_us(n: int, k: int, m: int, group_size: int, dtype: torch.dtype, zeros: bool) -> float:
    """Time of one gemm call with cold weights that nothing writes, in microseconds."""
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    weights = random_weights(n, k, group_size, dtype, zeros)
    gemm = torch.ops.marlin.gemm
    return timing.time_us([lambda w=w: gemm(x, *w, static_weights=True) for w in weights])


def marlin_us_of_each(n: int, k: int, ms: Iterable[int]) -> dict[int, float]:
    """As :func:`marlin_us` in fp16 with groups of 128, for many M; shorter windows."""
    weights = random_weights(n, k, 128, torch.float16, zeros=False)
    gemm = torch.ops.marlin.gemm
    out = {}
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        calls = [lambda x=x, w=w: gemm(x, *w, static_weights=True) for w in weights]
        out[m] = timing.time_us(calls, window_ms=2.0, repeats=5)
    return out


def cublas_us(n: int, k: int, m: int) -> float:
    """Time of one fp16 ``linear`` call with cold weights, in microseconds."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    copies = timing.copies_for(2 * n * k)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(copies)]
    return timing.time_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def points(only: list[str] | None, ms: list[int] | None) -> Iterator[tuple[int, int, int]]:
    """The (n, k, m) to measure: all, or the given ``NxK`` and ``m``."""
    wanted = shapes.GEMM_POINTS
    if only:
        pairs = [tuple(int(v) for v in name.split("x")) for name in only]
        wanted = {(n, k): shapes.GEMM_POINTS.get((n, k), (1, 16, 64)) for n, k in pairs}
    for (n, k), default_ms in wanted.items():
        for m in ms or default_ms:
            yield n, k, m


def measure(args: argparse.Namespace) -> list[Row]:
    """Measures every point, printing a line for each."""
    rows = []
    print(
        f"{'N x K':>14} {'M':>5} {'us':>8} {'cuBLAS':>8} {'floor':>8} {'share':>6} {'speedup':>7}"
    )
    for n, k, m in points(args.shape, args.m):
        us = marlin_us(n, k, m, args.group_size, DTYPES[args.dtype], args.zeros)
        reference = cublas_us(n, k, m)
        floor = shapes.floor_us(n, k, m, args.group_size, zeros=args.zeros)
        variant = "dense-asymmetric" if args.zeros else "dense"
        row = Row(
            variant, args.dtype, n, k, m, args.group_size,
            round(us, 2), round(reference, 2), round(floor, 2),
            round(floor / us, 3), round(reference / us, 2),
        )  # fmt: skip
        rows.append(row)
        print(
            f"{n:>7}x{k:<6} {m:>5} {us:8.2f} {reference:8.2f} {floor:8.2f} "
            f"{row.share:6.2f} {row.speedup:6.2f}x",
            flush=True,
        )
        torch.cuda.empty_cache()
    return rows


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summarise(rows: list[Row]) -> None:
    """Prints the geometric mean share of the floor by range of M."""
    for name, low, high in (
        ("M <= 32", 1, 32),
        ("M = 64, 128", 64, 128),
        ("M >= 256", 256, 1 << 30),
    ):
        shares = [row.share for row in rows if low <= row.m <= high]
        if shares:
            mean = geometric_mean(shares)
            print(f"geometric mean share of the floor, {name}: {mean:.3f} ({len(shares)} points)")


def add_point_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to measure."""
    parser.add_argument(
        "--shape", action="append", metavar="NxK", help="only this layer; may repeat"
    )
    parser.add_argument(
        "--m", type=lambda s: [int(v) for v in s.split(",")], help="tokens, e.g. 1,16"
    )
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128, -1))
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--zeros", action="store_true", help="asymmetric: with zero points")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks gemm``."""
    add_point_arguments(parser)
    parser.add_argument("--commit", help="what to record, where the checkout has no git history")
    parser.add_argument("--json", type=Path, help="where to write the results")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and writes the JSON if asked to."""
    rows = measure(args)
    summarise(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"meta": meta.describe(args.commit), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
