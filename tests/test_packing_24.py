"""pack_24, unpack_24, dequantize_24: exact, against tests/reference.py."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, GROUP_SIZES, groups_of, random_24, stored

ops = torch.ops.marlin
SHAPES = [(64, 128), (1, 4), (72, 200), (200, 72), (129, 332), (576, 1856), (64, 4640)]


def test_pack_and_unpack(device: str) -> None:
    for n, k in SHAPES:
        q, mask = random_24(n, k)
        qweight, meta = ops.pack_24(q.to(device), mask.to(device))
        expected_qweight, expected_meta = reference.pack_24(q, mask)
        assert torch.equal(qweight.cpu(), expected_qweight)
        assert torch.equal(meta.cpu(), expected_meta)
        values, places = ops.unpack_24(qweight, meta, n, k)
        assert torch.equal(places.cpu(), stored(mask))
        assert torch.equal(values.cpu(), q * stored(mask))
        again = ops.pack_24(values, places)
        assert torch.equal(again[0], qweight)
        assert torch.equal(again[1], meta)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 2**31))
def test_round_trip_of_any_shape(n: int, quads: int, seed: int) -> None:
    q, mask = random_24(n, 4 * quads, seed)
    packed = ops.pack_24(q, mask)
    assert all(map(torch.equal, packed, reference.pack_24(q, mask)))
    values, places = ops.unpack_24(*packed, n, 4 * quads)
    assert torch.equal(values, q * stored(mask))
    assert bool((places.view(n, quads, 4).sum(-1) == 2).all())
    assert bool(places[mask].all())


def test_every_pair_of_places(device: str) -> None:
    """One weight at a time, at every row and column of a block and at every pair of places."""
    for first in range(4):
        for second in range(first + 1, 4):
            mask = torch.zeros(64, 32, 4, dtype=torch.bool)
            mask[..., [first, second]] = True
            q = torch.arange(64 * 128).view(64, 128).remainder(15).add(1).to(torch.uint8)
            packed = ops.pack_24(q.to(device), mask.view(64, 128).to(device))
            values, places = ops.unpack_24(*packed, 64, 128)
            assert torch.equal(places.cpu(), mask.view(64, 128))
            assert torch.equal(values.cpu(), q * mask.view(64, 128))


def test_dequantize(device: str) -> None:
    for dtype in DTYPES:
        for group_size in GROUP_SIZES:
            for n, k in ((64, 128), (77, 304), (200, 72)):
                for asymmetric in (False, True):
                    q, mask = random_24(n, k)
                    groups = groups_of(k, group_size)
                    scales = (torch.rand(groups, n) * 0.02 + 0.001).to(dtype)
                    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8)
                    z = zeros if asymmetric else torch.full_like(zeros, 8)
                    group = reference.group_of_column(k, groups)
                    weight = (q.double() - z[group].T) * scales.double()[group].T
                    packed = ops.pack_24(q.to(device), mask.to(device))
                    got = ops.dequantize_24(
                        *packed, scales.to(device), zeros.to(device) if asymmetric else None, k=k
                    )
                    expected = torch.where(stored(mask), weight, 0.0).float().to(dtype)
                    assert torch.equal(got.cpu(), expected)


def test_dequantize_without_k_takes_whole_blocks(device: str) -> None:
    q, mask = random_24(64, 256)
    packed = ops.pack_24(q.to(device), mask.to(device))
    scales = torch.ones(1, 64, dtype=torch.float16, device=device)
    assert ops.dequantize_24(*packed, scales).shape == (64, 256)


def test_a_mask_that_keeps_three_is_refused_by_place() -> None:
    q, mask = random_24(80, 64)
    mask[70, 12:16] = torch.tensor([True, True, False, True])
    message = r"keeps 3 weights of row 70, columns 12\.\.15; at most 2 of every 4"
    with pytest.raises(RuntimeError, match=message):
        ops.pack_24(q, mask)


def test_any_byte_but_zero_keeps() -> None:
    q, mask = random_24(64, 128)
    bytes_of_255 = (mask.byte() * 255).view(torch.bool)
    assert all(map(torch.equal, ops.pack_24(q, bytes_of_255), ops.pack_24(q, mask)))


@pytest.mark.parametrize("op", ["unpack_24", "dequantize_24"])
def test_metadata_with_wrong_places_is_refused_by_place(op: str) -> None:
    q, mask = random_24(80, 256)
    qweight, meta = ops.pack_24(q, mask)
    # Row 64 + 17, columns 128 + 96 ..: thread 32 + 4 + 2 of the last block, word 1, nibble 0.
    meta[1, 1, 38 * 2 + 1] = meta[1, 1, 38 * 2 + 1] & ~0xF | 0b0110
    arguments = (80, 256) if op == "unpack_24" else (torch.ones(1, 80).half(),)
    getattr(ops, op)(qweight, meta, *arguments)  # row 81 is padding
    meta[1, 1, 6 * 2 + 1] = meta[1, 1, 6 * 2 + 1] & ~0xF | 0b0110
    message = r"places 2, 1 for row 65, columns 224\.\.227; the first must be the smaller"
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(qweight, meta, *arguments)
