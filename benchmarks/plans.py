"""Times every kernel and cluster that can do a shape: what the plan tables are derived from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks import gemm, shapes, timing
from marlin import _inspect

# (blocks of a cluster, those of them that share activations), by family.
K_SHARED = tuple((cluster, 1) for cluster in range(1, 9))
PARTITIONS = {
    "sm80": ((1, 1),),
    "sm90_decode": ((1, 1), (2, 1)),
    "sm90_prefill": (*K_SHARED, (2, 2), (4, 2)),
    "sm80_24": ((1, 1),),
    "sm90_decode_24": ((1, 1), (2, 1)),
    "sm90_prefill_24": (*K_SHARED, (2, 2), (4, 2)),
}


def candidates(m: int, variant: str) -> Iterator[tuple[int, str, int, int]]:
    """The (id, name, cluster, input_shares) of everything that can run ``m`` tokens here."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    for kernel in _inspect.plans():
        if kernel["sparse"] != (variant == "24") or kernel["shared_bytes"] > shared:
            continue
        if not hopper and not kernel["family"].startswith("sm80"):
            continue
        if kernel["any_m"] or kernel["tokens"] >= m:
            for partition in PARTITIONS[kernel["family"]]:
                if kernel["runs"] and partition[0] > 1:
                    continue  # takes no clusters
                yield kernel["id"], kernel["name"], *partition


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
        chosen = taken["kernel"]["id"], taken.get("cluster", 1), taken.get("input_shares", 1)
        floor = shapes.floor_us(n, k, m, args.group_size, zeros=args.zeros, sparse=sparse)
        calls = gemm.marlin_calls(args.variant, n, k, m, args.group_size, dtype, args.zeros)
        times = []
        try:
            for id, name, cluster, input_shares in candidates(m, args.variant):
                _inspect.force_plan(id, cluster=cluster, input_shares=input_shares)
                us = timing.measure(calls, sustained=False).us
                is_chosen = (id, cluster, input_shares) == chosen
                times.append((us, name, cluster, input_shares, is_chosen))
        finally:
            _inspect.force_plan()
        del calls
        torch.cuda.empty_cache()
        print(f"{n} x {k}, M = {m}, floor {floor:.2f} us")
        for rank, (us, name, cluster, input_shares, is_chosen) in enumerate(sorted(times)):
            if rank < args.best or is_chosen:
                mark = "*" if is_chosen else " "
                shares = f", activations shared by {input_shares}" if input_shares > 1 else ""
                print(
                    f"  {mark} {us:9.2f} us  {floor / us:5.2f}  {name}, cluster {cluster}{shares}"
                )
    return 0
