"""A short run of every kernel for compute-sanitizer (``make sanitize``), checked against fp64.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own and a
read past its end, or of scratch that nobody wrote, is seen.
"""

from __future__ import annotations

import os
import sys

import reference
import torch
from operands import DTYPES, make_input, make_weight

import marlin  # noqa: F401 - loads the ops
from marlin import _inspect

# (N, K), tokens, multiprocessors: what makes the planner take Hopper's decode kernels of 128 rows,
# whole tiles and tiles split across a cluster. tests/test_inspect.py checks that none is left out.
NARROW, NARROW_TOKENS, NARROW_SMS = (
    ((72, 200, 32), (77, 301, 128), (320, 5000, 64)),
    (1, 9, 20, 70),
    (0, 3),
)
WIDE, WIDE_TOKENS, WIDE_SMS = (25700, 2100), (9, 20), (0, 1000)
FORCED_FAMILIES = ("sm80", "sm90_prefill")
PREFILL_CLUSTERS, PREFILL_SMS = (1, 3), (0, 3)


def multiply_wide() -> None:
    """The planner's choice for a layer with many tiles."""
    for dtype, group_size, full in ((DTYPES[0], 128, False), (DTYPES[1], 32, True)):
        w = make_weight(
            *WIDE, group_size, dtype=dtype, device="cuda", zeros=full, perm=full, bias=full
        )
        dense = w.dense64()
        for sms in WIDE_SMS:
            _inspect.force_plan(sms=sms)
            for m in WIDE_TOKENS:
                x = make_input(m, WIDE[1], dtype=dtype, device="cuda")
                reference.assert_close(w.gemm(x), x, dense, w.bias)
    _inspect.force_plan()


def multiply() -> None:
    """Every kernel, with and without every option; on 3 multiprocessors, blocks do many units."""
    for dtype in DTYPES:
        for n, k, group_size in NARROW:
            for full in (False, True):
                w = make_weight(
                    n, k, group_size, dtype=dtype, device="cuda", zeros=full, perm=full, bias=full
                )
                dense = w.dense64()
                ids = [kernel["id"] for kernel in _inspect.plans() if kernel["family"] == "sm80"]
                for id in (*ids, -1):  # -1: the planner's choice, Hopper's kernels where it can
                    for sms in NARROW_SMS:
                        _inspect.force_plan(id, sms=sms)
                        for m in NARROW_TOKENS if id == -1 else (7,):
                            x = make_input(m, k, dtype=dtype, device="cuda")
                            rounded = False if id >= 0 else None
                            reference.assert_close(w.gemm(x), x, dense, w.bias, rounded=rounded)
    _inspect.force_plan()


def multiply_prefill() -> None:
    """Every prefill kernel, alone and in clusters, in runs of pieces and in groups of tiles."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dtype, group_size, full in ((DTYPES[0], 128, False), (DTYPES[1], 32, True)):
        w = make_weight(
            1000, 700, group_size, dtype=dtype, device="cuda", zeros=full, perm=full, bias=full
        )
        dense = w.dense64()
        for kernel in _inspect.plans():
            if kernel["family"] != "sm90_prefill":
                continue
            for cluster in PREFILL_CLUSTERS:
                for sms in PREFILL_SMS:
                    _inspect.force_plan(kernel["id"], sms=sms, cluster=cluster)
                    for m in (33, 300):
                        x = make_input(m, 700, dtype=dtype, device="cuda")
                        reference.assert_close(w.gemm(x), x, dense, w.bias, rounded=True)
    _inspect.force_plan()


def pack() -> None:
    """The load-time kernels."""
    ops = torch.ops.marlin
    w = make_weight(136, 328, 32, device="cuda", zeros=True, perm=True)
    assert torch.equal(ops.pack(w.q), w.qweight)
    assert torch.equal(ops.unpack(w.qweight, 136, 328), w.q)
    assert torch.equal(ops.repack_gptq(reference.gptq_pack(w.q).cuda()), w.qweight)
    assert torch.equal(ops.repack_awq(reference.awq_pack(w.q).cuda()), w.qweight)
    dense = ops.dequantize(w.qweight, w.scales, w.zeros, w.perm, k=328)
    assert torch.equal(dense, w.dense64().half())


def main() -> int:
    """Runs all of it."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("set PYTORCH_NO_CUDA_MEMORY_CACHING=1 first")
        return 2
    pack()
    multiply()
    multiply_wide()
    multiply_prefill()
    torch.cuda.synchronize()
    print("sanitizer workload: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
