"""Other kernels for the same work, measured beside ours with ``python -m benchmarks gemm --peer``.

A peer is a function ``(n, k, m, group_size) -> calls``: as many calls as make a walk over their
weights cold, or a ``ValueError`` that says why it cannot. Those here come with torch; any other is
named as ``module:function``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

from benchmarks import timing

Call = Callable[[], object]
Peer = Callable[[int, int, int, int], Sequence[Call]]


def tinygemm(n: int, k: int, m: int, group_size: int) -> list[Call]:
    """torch's ``_weight_int4pack_mm`` (torchao's int4 weight-only linear), bfloat16."""
    if m > 32:
        raise ValueError("tinygemm is for few tokens: with 32 it takes longer than fp16")
    if group_size not in (32, 64, 128) or k % group_size:
        raise ValueError("tinygemm wants groups of 32, 64 or 128 that divide K")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    aten = torch.ops.aten

    def call() -> Call:
        q = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = aten._convert_weight_to_int4pack(q, 8)
        factors = torch.rand(k // group_size, n, 2, device="cuda", dtype=torch.bfloat16)
        return lambda: aten._weight_int4pack_mm(x, packed, group_size, factors)

    return [call() for _ in range(timing.copies_for(n * k // 2))]


def cusparselt(n: int, k: int, m: int, group_size: int) -> list[Call]:
    """cuSPARSELt's fp16 product with 2:4 sparse weights, through torch."""
    del group_size
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    keep = torch.tensor([True, True, False, False], device="cuda").repeat(k // 4)

    def call() -> Call:
        dense = torch.randn(n, k, device="cuda", dtype=torch.float16) * keep
        weight = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(dense)
        return lambda: torch.nn.functional.linear(x, weight)

    return [call() for _ in range(timing.copies_for(2 * n * k * 9 // 16))]


INCLUDED: dict[str, Peer] = {"tinygemm": tinygemm, "cusparselt": cusparselt}


def find(name: str) -> Peer:
    """The peer of a name: one of these, or ``module:function``."""
    if name in INCLUDED:
        return INCLUDED[name]
    module, _, function = name.partition(":")
    if not function:
        raise SystemExit(f"--peer {name}: give one of {', '.join(INCLUDED)}, or module:function")
    peer: Peer = getattr(importlib.import_module(module), function)
    return peer
