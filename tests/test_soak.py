"""Many launches over random shapes, options and streams: always the same bits.

A short run by default; MARLIN_SOAK=100000 for a long one.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from operands import ALL_OPTIONS, DTYPES, GROUP_SIZES, make_input, make_weight, make_weight_24
from torch import Tensor

# Of every family of kernels; from 4096 on, blocks share activations.
TOKENS = (1, 7, 16, 25, 40, 64, 100, 128, 200, 300, 600, 4100, 4500)
LAUNCHES = int(os.environ.get("MARLIN_SOAK", "3000"))


@pytest.mark.gpu
def test_soak() -> None:
    """Every launch gives what the same launch, alone on an idle GPU, gave at first."""
    rng = random.Random(0)
    cases = []
    for seed in range(80):
        make = rng.choice([make_weight, make_weight_24])
        n, k = rng.randrange(1, 3000), 4 * rng.randrange(1, 1250)
        dtype, m = rng.choice(DTYPES), rng.choice(TOKENS)
        options = {name: rng.random() < 0.3 for name in ALL_OPTIONS[make]}
        weight = make(
            n, k, rng.choice(GROUP_SIZES), dtype=dtype, device="cuda", seed=seed, **options
        )
        x = make_input(m, k, dtype=dtype, device="cuda", seed=seed)
        y = weight.gemm(x)
        torch.cuda.synchronize()
        cases.append((weight, x, y))
    streams = [torch.cuda.Stream() for _ in range(4)]
    different = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    for _ in range(LAUNCHES):
        i = rng.randrange(len(streams))
        weight, x, expected = rng.choice(cases)
        with torch.cuda.stream(streams[i]):
            y: Tensor = weight.gemm(x)
            different[i] += (y != expected).any()
    torch.cuda.synchronize()
    assert sum(int(d) for d in different) == 0
