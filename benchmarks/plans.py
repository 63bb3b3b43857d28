"""Times every kernel that can do a shape: what the plan tables are derived from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks import gemm, shapes, timing
from marlin import _inspect


def candidates(m: int, variant: str) -> Iterator[tuple[int, str, bool]]:
    """The (id, name, shares) of everything that can run ``m`` tokens here.

    Where tiles go round, a kernel does the same whether blocks were to share them or not.
    """
    hopper = torch.cuda.get_device_capability() == (9, 0)
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    for kernel in _inspect.plans():
        if kernel["sparse"] != (variant == "24") or kernel["shared_bytes"] > shared:
            continue
        if not hopper and not kernel["family"].startswith("sm80"):
            continue
        if kernel["any_m"] or kernel["tokens"] >= m:
            for shares in kernel["shares"]:
                yield kernel["id"], kernel["name"], shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks plans``."""
    gemm.add_point_arguments(parser)
    parser.add_argument("--variant", default="dense", choices=("dense", "24"))
    parser.add_argument("--best", type=int, default=8, help="how many to print of each point")


def run(args: argparse.Namespace) -> int:
    """Measures and prints, the fastest first; ``*`` marks what the planner takes."""
    dtype = gemm.DTYPES[args.dtype]
    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties().multi_processor_count
    for n, k, m in gemm.points(args.shape, args.m, others=args.others):
        sparse = args.variant == "24"
        taken = _inspect.plan_for(
            m, n, k, group_size=args.group_size, sm=10 * major + minor, sms=sms, sparse=sparse
        )
        chosen = taken["kernel"]["id"], taken.get("shares", False)
        floor = shapes.floor_us(n, k, m, args.group_size, zeros=args.zeros, sparse=sparse)
        calls = gemm.marlin_calls(args.variant, n, k, m, args.group_size, dtype, args.zeros)
        times = []
        try:
            for id, name, shares in candidates(m, args.variant):
                _inspect.force_plan(id, shares=shares)
                us = timing.measure(calls, sustained=False).us
                times.append((us, name, shares, (id, shares) == chosen))
        finally:
            _inspect.force_plan()
        del calls
        torch.cuda.empty_cache()
        print(f"{n} x {k}, M = {m}, floor {floor:.2f} us")
        for rank, (us, name, shares, is_chosen) in enumerate(sorted(times)):
            if rank < args.best or is_chosen:
                mark = "*" if is_chosen else " "
                how = ", shared tiles" if shares else ""
                print(f"  {mark} {us:9.2f} us  {floor / us:5.2f}  {name}{how}")
    return 0
