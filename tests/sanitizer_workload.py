"""A short run of every kernel for compute-sanitizer (``make sanitize``), checked against fp64.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own and a
read past its end, or of scratch that nobody wrote, is seen; and with SANITIZER=racecheck under that
tool, for which some cases are too long (see SHORT_K).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import reference
import torch
from operands import ALL_OPTIONS, DTYPES, Maker, make_input, make_weight, make_weight_24

import marlin  # noqa: F401 - loads the ops
from marlin import _inspect

SHAPES = ((72, 200, 32), (77, 301, 128), (320, 5000, 64))  # N, K, group size
SHAPES_24 = ((72, 200, 32), (77, 300, 128), (320, 5000, 64))
SMS = (0, 3)  # multiprocessors: on three, blocks do many units
HOPPER_K = 700
# racecheck seems to let no warp of a block past `barrier.cluster.wait` before all are there. In
# decode kernels in pairs of blocks, those that copy get there after their last copy: there no ring
# may go round, of which some have three stages.
SHORT_K = 72
RACECHECK = os.environ.get("SANITIZER") == "racecheck"
# Of 13 blocks of rows, two pairs of blocks do several tiles, share one, and half a one; of six, one
# shares a tile and half a one, and no more; of three, one shares half a one, and all do one each.
# With prefill kernels and tiles of three or four of them, of which there are four or more, blocks
# share only on seven.
HOPPER_SMS = (0, 5, 7)
HALF_TILE_SMS = (6, 12)


@contextlib.contextmanager
def torch_fills(new_memory: bool) -> Iterator[None]:
    """Torch fills scratch and outputs (with NaN) where initcheck cannot tell what was written.

    It does not see what the copy engine stores, that is, prefill kernels' outputs; and blocks that
    share tiles over memory read flags that nobody has cleared (partials.cuh). It then sees no
    partial sums that nobody left; outputs are compared in any case.
    """
    torch.use_deterministic_algorithms(new_memory)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def multiply_with(make: Maker, shapes: tuple[tuple[int, int, int], ...], family: str) -> None:
    """Every kernel of an sm80 family and the planner's choice, with and without every option."""
    ids = [kernel["id"] for kernel in _inspect.plans() if kernel["family"] == family]
    for dtype in DTYPES:
        for n, k, group_size in shapes:
            for options in ({}, ALL_OPTIONS[make]):
                w = make(n, k, group_size, dtype=dtype, device="cuda", **options)
                dense = w.dense64()
                for id in (*ids, -1):  # -1: the planner's choice, Hopper's kernels where it can
                    for sms in SMS:
                        _inspect.force_plan(id, sms=sms)
                        for m in (1, 9, 20, 70) if id == -1 else (7,):
                            x = make_input(m, k, dtype=dtype, device="cuda")
                            rounded = False if id >= 0 else None
                            with torch_fills(id == -1):
                                y = w.gemm(x)
                            reference.assert_close(
                                y, x, dense, w.bias,
                                rounded=rounded, group_size=group_size,
                                sparse=make is make_weight_24,
                            )  # fmt: skip
    _inspect.force_plan()


def multiply() -> None:
    """Dense weights."""
    multiply_with(make_weight, SHAPES, "sm80")


def multiply_24() -> None:
    """2:4 sparse weights."""
    multiply_with(make_weight_24, SHAPES_24, "sm80_24")


def hopper_cases() -> Iterator[tuple[dict[str, Any], dict[str, int], int]]:
    """Yields (kernel, partition, M): every Hopper kernel, with blocks that share tiles or not.

    Of its blocks, some do a part of a tile, some one, some many.
    """
    for kernel in _inspect.plans():
        if kernel["family"].startswith("sm80"):
            continue
        few = not kernel["family"].startswith("sm90_prefill")
        for shares in kernel["shares"]:
            for sms in (*HOPPER_SMS, *(HALF_TILE_SMS if kernel["cuts_tiles"] else ())):
                partition = {"sms": sms, "shares": shares}
                ms = [1, max(kernel["tokens"] - 1, 1)] if few else [33, 300, 450]
                if few and kernel["any_m"] and columns_of(kernel, partition) == HOPPER_K:
                    ms.append(2 * kernel["tokens"] - 1)
                for m in ms:
                    yield kernel, partition, m


def columns_of(kernel: dict[str, Any], partition: dict[str, int]) -> int:
    """K of a case."""
    in_pairs = partition["shares"] and not kernel["shares_over_memory"]
    return SHORT_K if RACECHECK and in_pairs else HOPPER_K


def multiply_on_hopper(part: int = 0, parts: int = 1) -> None:
    """Runs one part of several of the Hopper cases, so that processes can share them."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dtype, group_size, full in ((DTYPES[0], 128, False), (DTYPES[1], 32, True)):
        weights = {}
        for sparse, make in ((False, make_weight), (True, make_weight_24)):
            options = ALL_OPTIONS[make] if full else {}
            for k in (HOPPER_K, SHORT_K):
                w = make(776, k, group_size, dtype=dtype, device="cuda", **options)
                weights[sparse, k] = w, w.dense64()
        cases = list(hopper_cases())[part::parts]
        for done, (kernel, partition, m) in enumerate(cases):
            if done % 20 == 0:  # racecheck takes seconds a launch
                print(f"{done} of {len(cases)} launches, {dtype}", flush=True)
            _inspect.force_plan(kernel["id"], **partition)
            k = columns_of(kernel, partition)
            x = make_input(m, k, dtype=dtype, device="cuda")
            w, dense = weights[kernel["sparse"], k]
            rounded = reference.kernel_rounds(kernel, group_size)
            with torch_fills(kernel["shares_over_memory"]):
                y = w.gemm(x)
            reference.assert_close(y, x, dense, w.bias, rounded=rounded)
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
    mask = torch.tensor([False, True, True, False], device="cuda").repeat(136, 82)
    sparse = ops.pack_24(w.q, mask)
    assert torch.equal(ops.unpack_24(*sparse, 136, 328)[0], w.q * mask)
    assert ops.dequantize_24(*sparse, w.scales, w.zeros, k=328).shape == (136, 328)


PARTS = {
    "pack": pack,
    "multiply": multiply,
    "multiply_24": multiply_24,
    "hopper": multiply_on_hopper,
}


def main(names: list[str]) -> int:
    """Runs the parts named, or all."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("set PYTORCH_NO_CUDA_MEMORY_CACHING=1 first")
        return 2
    shares = [f"hopper:{i}/{n}" for n in range(2, 17) for i in range(n)]
    unknown = [name for name in names if name not in PARTS and name not in shares]
    if unknown:
        print(
            f"got {', '.join(unknown)}; the parts are {', '.join(PARTS)}, hopper:0/4 the first "
            "quarter of hopper, and so on; name none for all"
        )
        return 2
    for name in names or PARTS:
        if name in PARTS:
            PARTS[name]()
        else:
            multiply_on_hopper(*map(int, name.removeprefix("hopper:").split("/")))
        torch.cuda.synchronize()
        print(f"sanitizer workload: {name} done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
