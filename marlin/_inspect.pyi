"""What was built, and what the planner chooses."""

from typing import Any

def plans() -> list[dict[str, Any]]:
    """Every compiled GEMM kernel: id, name, tile, threads, shared memory, and why it exists.

    ``sparse``: for 2:4 sparse weights, or else for dense ones. ``any_m``: takes more
    tokens than a tile holds. ``shares``: what ``force_plan`` takes of it.
    ``shares_over_memory``: any of its blocks may share a tile, over global memory, and not two in a
    cluster. ``cuts_tiles``: a pair of its blocks may get half a tile.
    ``rounds_groups``: the group sizes, of 32, 64 and 128 (and all above), whose weights it
    multiplies as ``dequantize`` rounds them; the exact values of others.
    """

def plan_for(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int = 128,
    bf16: bool = False,
    sparse: bool = False,
    sm: int,
    sms: int,
) -> dict[str, Any]:
    """The kernel and the partition chosen for a problem on a device.

    ``sparse``: of a 2:4 sparse weight. ``sm`` is the compute capability times ten, ``sms`` the
    number of multiprocessors. How many clusters of blocks fit is guessed from it; a call asks the
    device, and may differ. Of what is returned, ``rounds_weights`` says whether weights are
    multiplied as ``dequantize`` rounds them, or else their exact values. Raises ``ValueError`` for
    sizes below 1, another group size, or a K of a 2:4 sparse weight that is no multiple of 4;
    ``RuntimeError`` where no kernel runs.
    """

def build_info() -> dict[str, str]:
    """Version, CUDA toolkit (empty: CPU only), architectures, torch, build type, compiler."""

def kernel_attributes(id: int, *, bf16: bool = False) -> dict[str, int]:
    """Registers, local and shared bytes, threads and blocks per multiprocessor of a kernel.

    Asks the current CUDA device; raises ``RuntimeError`` without one, or for an unknown id.
    """

def force_plan(id: int = -1, *, sms: int = 0, shares: bool = False) -> None:
    """For tests and benchmarks: until called again, every CUDA gemm that can runs kernel ``id``.

    -1: whatever the planner chooses. ``sms``: as if the device had that many multiprocessors (0: as
    many as it has). ``shares``: whether blocks share tiles that would not go round; only asked of
    the kernels whose ``plans()`` entry lists both. Raises ``RuntimeError`` for an unknown id, or
    without CUDA kernels. A gemm of the other kind of weight (``sparse``) then raises it.
    """
