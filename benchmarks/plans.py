"""Times every kernel and cluster that can do a shape: what the plan tables are derived from."""

from __future__ import annotations

import argparse

import torch

from benchmarks import gemm, shapes
from marlin import _inspect

CLUSTERS = {"sm80": (1,), "sm90_decode": (1, 2), "sm90_prefill": tuple(range(1, 9))}


def candidates(m: int) -> list[tuple[int, str, int]]:
    """The (id, name, cluster) of every kernel for dense weights that can run ``m`` tokens here."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    return [
        (kernel["id"], kernel["name"], cluster)
        for kernel in _inspect.plans()
        if not kernel["sparse"]
        for cluster in CLUSTERS[kernel["family"]]
        if (hopper or kernel["family"] == "sm80")
        and kernel["shared_bytes"] <= shared
        and (kernel["family"] != "sm90_decode" or kernel["tokens"] >= m)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks plans``."""
    gemm.add_point_arguments(parser)
    parser.add_argument("--best", type=int, default=8, help="how many to print of each point")


def run(args: argparse.Namespace) -> int:
    """Measures and prints, the fastest first; ``*`` marks what the planner takes."""
    dtype = gemm.DTYPES[args.dtype]
    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties().multi_processor_count
    for n, k, m in gemm.points(args.shape, args.m):
        taken = _inspect.plan_for(
            m, n, k, group_size=args.group_size, sm=10 * major + minor, sms=sms
        )
        chosen = taken["kernel"]["id"], taken.get("cluster", 1)
        floor = shapes.floor_us(n, k, m, args.group_size, zeros=args.zeros)
        times = []
        try:
            for id, name, cluster in candidates(m):
                _inspect.force_plan(id, cluster=cluster)
                us = gemm.marlin_us(n, k, m, args.group_size, dtype, args.zeros)
                times.append((us, name, cluster, (id, cluster) == chosen))
                torch.cuda.empty_cache()
        finally:
            _inspect.force_plan()
        print(f"{n} x {k}, M = {m}, floor {floor:.2f} us")
        for rank, (us, name, cluster, is_chosen) in enumerate(sorted(times)):
            if rank < args.best or is_chosen:
                mark = "*" if is_chosen else " "
                print(f"  {mark} {us:9.2f} us  {floor / us:5.2f}  {name}, cluster {cluster}")
    return 0
