"""Times every kernel and cluster that can do a shape: what the plan tables are derived from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks import gemm, shapes, timing
from marlin import _inspect

# Blocks of a cluster, by family: pairs that may share a tile, or blocks that share activations.
CLUSTERS = {
    "sm80": (1,),
    "sm90_decode": (1, 2),
    "sm90_prefill": (1, 2, 4),
    "sm80_24": (1,),
    "sm90_decode_24": (1, 2),
    "sm90_prefill_24": (1, 2, 4),
}


def candidates(m: int, variant: str) -> Iterator[tuple[int, str, int]]:
    """The (id, name, cluster) of everything that can run ``m`` tokens here."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    for kernel in _inspect.plans():
        if kernel["sparse"] != (variant == "24") or kernel["shared_bytes"] > shared:
            continue
        if not hopper and not kernel["family"].startswith("sm80"):
            continue
        if kernel["any_m"] or kernel["tokens"] >= m:
            for cluster in CLUSTERS[kernel["family"]]:
                if kernel["runs"] and cluster > 1:
                    continue  # takes no clusters
                yield kernel["id"], kernel["name"], cluster


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
        chosen = taken["kernel"]["id"], taken.get("cluster", 1)
        floor = shapes.floor_us(n, k, m, args.group_size, zeros=args.zeros, sparse=sparse)
        calls = gemm.marlin_calls(args.variant, n, k, m, args.group_size, dtype, args.zeros)
        times = []
        try:
            for id, name, cluster in candidates(m, args.variant):
                _inspect.force_plan(id, cluster=cluster)
                us = timing.measure(calls, sustained=False).us
                times.append((us, name, cluster, (id, cluster) == chosen))
        finally:
            _inspect.force_plan()
        del calls
        torch.cuda.empty_cache()
        print(f"{n} x {k}, M = {m}, floor {floor:.2f} us")
        for rank, (us, name, cluster, is_chosen) in enumerate(sorted(times)):
            if rank < args.best or is_chosen:
                mark = "*" if is_chosen else " "
                print(f"  {mark} {us:9.2f} us  {floor / us:5.2f}  {name}, cluster {cluster}")
    return 0
