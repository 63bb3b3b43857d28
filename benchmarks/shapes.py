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

# Layers that are in no table, small and narrow ones and a vocabulary among them, and what may go
# wrong at each: tiles that do not go round the multiprocessors.
OTHER_LAYERS = (
    (1024, 1024), (2048, 2048), (4096, 1024), (1024, 4096), (768, 4096), (1536, 4096), (3072, 3072),
    (3584, 3584), (4608, 3584), (2560, 2560), (5120, 5120), (7168, 5120), (6144, 4096),
    (2048, 14336), (1024, 8192), (8192, 1024), (4096, 11008), (3584, 18944), (37888, 3584),
    (14336, 4096), (11008, 4096), (5120, 13824), (27648, 5120), (10240, 8192), (128256, 4096),
    (256, 7168), (7168, 2048), (512, 4096), (4096, 512),
)  # fmt: skip
OTHER_POINTS = dict.fromkeys(OTHER_LAYERS, (48, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096))

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
