"""Times ``torch.ops.marlin.gemm`` beside cuBLAS fp16 and writes the results as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path

import torch

import marlin  # noqa: F401 - loads the ops
from benchmarks import meta, peers, shapes, timing
from benchmarks.arguments import layer, positives

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """One point: microseconds, ``share`` of the floor, ``speedup`` over cuBLAS fp16.

    Share and speedup are of ``us``, not of ``sustained_us`` (see :class:`timing.Times`).
    """

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
    sustained_us: float
    cublas_sustained_us: float
    peers_us: dict[str, float] = field(default_factory=dict)


def random_weight(
    n: int, k: int, group_size: int, dtype: torch.dtype, zeros: bool, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A dense (qweight, scales, zeros)."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    blocks = (-(-n // 64), -(-k // 64), 512)
    qweight = torch.randint(-(2**31), 2**31, blocks, device=device, dtype=torch.int32)
    scales = torch.rand(groups, n, device=device).mul_(0.01).to(dtype)
    z = torch.randint(0, 16, (groups, n), device=device, dtype=torch.uint8) if zeros else None
    return qweight, scales, z


def random_weights(
    n: int, k: int, group_size: int, dtype: torch.dtype, zeros: bool
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """As many distinct ones as make a walk over them cold."""
    copies = timing.copies_for(n * k // 2)
    return [random_weight(n, k, group_size, dtype, zeros) for _ in range(copies)]


def random_places(n: int, k: int, device: str = "cuda") -> torch.Tensor:
    """The metadata of a 2:4 sparse weight: places that rise, as nibbles first | second << 2."""
    nibbles = torch.tensor([4, 8, 12, 9, 13, 14], device=device)
    meta = torch.zeros(-(-n // 64), -(-k // 128), 256, device=device, dtype=torch.int64)
    for i in range(8):
        meta |= nibbles[torch.randint(6, meta.shape, device=device)] << (4 * i)
    return torch.where(meta < 2**31, meta, meta - 2**32).to(torch.int32)


def random_weights_24(
    n: int, k: int, group_size: int, dtype: torch.dtype, zeros: bool
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Likewise (qweight, meta, scales, zeros) of 2:4 sparse weights."""
    places = random_places(n, k)  # drawing them is slow: every weight has a copy
    stored = -(-k // 2), max(group_size // 2, -1)  # columns, and of a group
    out = []
    for _ in range(timing.copies_for(n * k * 3 // 8)):
        qweight, scales, z = random_weight(n, *stored, dtype, zeros)
        out.append((qweight, places.clone(), scales, z))
    return out


def marlin_calls(
    variant: str, n: int, k: int, m: int, group_size: int, dtype: torch.dtype, zeros: bool
) -> list[Callable[[], object]]:
    """Calls with cold weights that nothing writes."""
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    if variant == "24":
        sparse = torch.ops.marlin.gemm_24
        return [
            lambda w=w: sparse(x, *w, static_weights=True)
            for w in random_weights_24(n, k, group_size, dtype, zeros)
        ]
    gemm = torch.ops.marlin.gemm
    return [
        lambda w=w: gemm(x, *w, static_weights=True)
        for w in random_weights(n, k, group_size, dtype, zeros)
    ]


def marlin_us_of_each(n: int, k: int, ms: Iterable[int]) -> dict[int, float]:
    """Microseconds of one gemm call in fp16 with groups of 128, for many M."""
    weights = random_weights(n, k, 128, torch.float16, zeros=False)
    gemm = torch.ops.marlin.gemm
    out = {}
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        calls = [lambda x=x, w=w: gemm(x, *w, static_weights=True) for w in weights]
        out[m] = timing.measure(calls, sustained=False, rest_s=0.01).us
    return out


def as_many(calls: list[Callable[[], object]], count: int) -> list[Callable[[], object]]:
    """At least ``count`` calls, the same ones in turn: a walk over few heats the GPU less."""
    return [*calls, *islice(cycle(calls), max(count - len(calls), 0))]


def cublas_calls(n: int, k: int, m: int) -> list[Callable[[], object]]:
    """Calls of fp16 ``linear`` with cold weights."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    copies = timing.copies_for(2 * n * k)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(copies)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def peers_us(names: list[str], n: int, k: int, m: int, group_size: int) -> dict[str, float]:
    """Times of the peers that can do a point."""
    out = {}
    for name in names:
        try:
            calls = as_many(peers.find(name)(n, k, m, group_size), timing.copies_for(n * k // 2))
        except ValueError:
            continue
        out[name] = round(timing.measure(calls, sustained=False).us, 2)
        del calls
        torch.cuda.empty_cache()
    return out


def points(
    only: list[tuple[int, int]] | None, ms: list[int] | None, *, others: bool = False
) -> Iterator[tuple[int, int, int]]:
    """The (n, k, m) to measure: all, or those of other layers, or the given layers and ``m``."""
    table = shapes.OTHER_POINTS if others else shapes.GEMM_POINTS
    wanted = {pair: table.get(pair, (1, 16, 64)) for pair in only} if only else table
    for (n, k), default_ms in wanted.items():
        for m in ms or default_ms:
            yield n, k, m


def measure(args: argparse.Namespace) -> list[Row]:
    """Measures every point, printing a line for each."""
    rows = []
    dtype = DTYPES[args.dtype]
    print(
        f"{'N x K':>14} {'M':>5} {'us':>8} {'cuBLAS':>8} {'floor':>8} {'share':>6} {'speedup':>7}"
        f" {'sustained':>9} {'cuBLAS':>8}"
    )
    for n, k, m in points(args.shape, args.m, others=args.others):
        reference = timing.measure(as_many(cublas_calls(n, k, m), timing.copies_for(n * k // 2)))
        others = peers_us(args.peer, n, k, m, args.group_size)
        for variant in args.variant or ["dense"]:
            calls = marlin_calls(variant, n, k, m, args.group_size, dtype, args.zeros)
            ours = timing.measure(calls)
            floor = shapes.floor_us(
                n, k, m, args.group_size, zeros=args.zeros, sparse=variant == "24"
            )
            row = Row(
                variant + ("-asymmetric" if args.zeros else ""),
                args.dtype, n, k, m, args.group_size,
                round(ours.us, 2), round(reference.us, 2), round(floor, 2),
                round(floor / ours.us, 3), round(reference.us / ours.us, 2),
                round(ours.sustained_us, 2), round(reference.sustained_us, 2), others,
            )  # fmt: skip
            rows.append(row)
            print(
                f"{n:>7}x{k:<6} {m:>5} {row.us:8.2f} {row.cublas_us:8.2f} {floor:8.2f} "
                f"{row.share:6.2f} {row.speedup:6.2f}x {row.sustained_us:9.2f} "
                f"{row.cublas_sustained_us:8.2f} {row.variant}",
                *(f"{name} {us}" for name, us in others.items()),
                flush=True,
            )
            del calls
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
        for variant in dict.fromkeys(row.variant for row in rows):
            some = [row for row in rows if low <= row.m <= high and row.variant == variant]
            if some:
                mean = geometric_mean([row.share for row in some])
                sustained = geometric_mean([row.floor_us / row.sustained_us for row in some])
                print(
                    f"geometric mean share of the floor, {variant}, {name}: {mean:.3f}, sustained "
                    f"{sustained:.3f} ({len(some)} points)"
                )


def add_point_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to measure."""
    parser.add_argument(
        "--shape", type=layer, action="append", metavar="NxK", help="only this layer; may repeat"
    )
    parser.add_argument(
        "--others", action="store_true", help="layers that are in no table (shapes.OTHER_LAYERS)"
    )
    parser.add_argument("--m", type=positives, help="tokens, e.g. 1,16")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128, -1))
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--zeros", action="store_true", help="asymmetric: with zero points")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks gemm``."""
    add_point_arguments(parser)
    parser.add_argument("--variant", action="append", choices=("dense", "24"), help="may repeat")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        help=f"{', '.join(peers.INCLUDED)} or module:function (benchmarks/peers.py); may repeat",
    )
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
