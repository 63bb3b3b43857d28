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


def multiply() -> None:
    """Every kernel of the table: all token tiles, split and whole tiles, every option."""
    shapes = ((72, 200, 32), (136, 456, 64), (77, 301, 128), (320, 2880, 128), (9000, 128, -1))
    for dtype in DTYPES:
        for n, k, group_size in shapes:
            for full in (False, True):
                w = make_weight(
                    n, k, group_size, dtype=dtype, device="cuda", zeros=full, perm=full, bias=full
                )
                dense = w.dense64()
                for m in (1, 9, 20, 70):
                    x = make_input(m, k, dtype=dtype, device="cuda")
                    reference.assert_close(w.gemm(x), x, dense, w.bias)


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
    torch.cuda.synchronize()
    print("sanitizer workload: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
