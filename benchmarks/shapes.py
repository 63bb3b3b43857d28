"""What is measured: the linear layers of well-known models, and the floor under their time."""

from __future__ import annotations

# (N, K): output features, input features -> the numbers of tokens M to measure.
GEMM_POINTS: dict[tuple[int, int], tuple[int, ...]] = {
    (8192, 8192): (1, 16, 32, 64, 128, 256, 512, 1024, 4096),
    (28672, 4096): (1, 8, 16, 32, 64, 128, 256, 1024, 8192),
    (4096, 4096): (1, 16, 64, 256, 1024),
    (4096, 14336): (1, 16, 64, 256, 1024),
    (8192, 28672): (1, 16, 64, 128, 256, 1024, 4096),
    (6144, 4096): (1, 16, 64),
    (57344, 8192): (1, 16, 32, 64, 128),
    (73728, 18432): (1, 16, 32, 64),
}

# Measured on an NVIDIA H200: the best read rate, and a large fp16 product under its power cap.
BYTES_PER_SECOND = 4.72e12
FLOPS_PER_SECOND = 790e12
SPARSE_FLOPS_PER_SECOND = 1376e12  # of the dense product; the rate of `wgmma.sp` in a bare loop


def floor_us(
    n: int, k: int, m: int, group_size: int, *, zeros: bool = False, sparse: bool = False
) -> float:
    """The least time, in microseconds, in which an H200 could do a 4-bit GEMM.

    The larger of reading weights, scales (and zero points) and activations and writing outputs
    once, and of doing the floating-point operations. A 2:4 sparse weight takes 3 bits, not 4.
    """
    groups = 1 if group_size == -1 else -(-k // group_size)
    moved = n * k * (3 if sparse else 4) / 8 + (3 if zeros else 2) * n * groups + 2 * m * (n + k)
    flops = SPARSE_FLOPS_PER_SECOND if sparse else FLOPS_PER_SECOND
    return 1e6 * max(moved / BYTES_PER_SECOND, 2 * m * n * k / flops)
