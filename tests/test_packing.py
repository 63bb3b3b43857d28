"""pack, unpack, repack_gptq, repack_awq, dequantize: exact, against tests/reference.py."""

from __future__ import annotations

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, GROUP_SIZES, make_weight

ops = torch.ops.marlin
SHAPES = [(64, 64), (1, 1), (72, 200), (200, 72), (129, 333), (576, 1856), (2880, 64), (64, 4640)]


def test_pack_and_unpack(device: str) -> None:
    for n, k in SHAPES:
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        packed = ops.pack(q.to(device))
        assert torch.equal(packed.cpu(), reference.pack(q))
        assert torch.equal(ops.unpack(packed, n, k).cpu(), q)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**31))
def test_round_trip_of_any_shape(n: int, k: int, seed: int) -> None:
    q = torch.randint(
        0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = ops.pack(q)
    assert torch.equal(packed, reference.pack(q))
    assert torch.equal(ops.unpack(packed, n, k), q)


def test_padding_is_zero(device: str) -> None:
    packed = ops.pack(torch.full((65, 66), 15, dtype=torch.uint8, device=device))
    whole = ops.unpack(packed, 128, 128)
    assert int(whole.count_nonzero()) == 65 * 66


def test_repack_gptq(device: str) -> None:
    for n, k in ((64, 64), (72, 200), (1001, 328), (64, 4640)):
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        source, perm = reference.gptq_pack(q).to(device), torch.randperm(k).int()
        assert torch.equal(ops.repack_gptq(source).cpu(), reference.pack(q))
        assert torch.equal(
            ops.repack_gptq(source, perm.to(device)).cpu(), reference.pack(q[:, perm.long()])
        )


def test_repack_awq(device: str) -> None:
    for n, k in ((64, 64), (72, 201), (1000, 333), (4640, 64)):
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        packed = ops.repack_awq(reference.awq_pack(q).to(device))
        assert torch.equal(packed.cpu(), reference.pack(q))


def test_dequantize(device: str) -> None:
    for dtype in DTYPES:
        for group_size in GROUP_SIZES:
            for n, k in ((64, 128), (77, 301), (200, 72)):
                for options in (False, True):
                    w = make_weight(
                        n, k, group_size, dtype=dtype, device=device, zeros=options, perm=options
                    )
                    got = ops.dequantize(w.qweight, w.scales, w.zeros, w.perm, k=k)
                    assert torch.equal(got, w.dense64().float().to(dtype))


def test_dequantize_without_k_takes_whole_blocks(device: str) -> None:
    w = make_weight(64, 128, device=device)
    assert torch.equal(ops.dequantize(w.qweight, w.scales), w.dense64().half())
