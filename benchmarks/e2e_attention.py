"""Attention of one new token a sequence, in a kernel that lets the next one start early.

See :mod:`benchmarks.e2e_pieces`. torch's attention starts when the kernel before it has ended, and
the next kernel when it has.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_HEADS = 16  # that read one head of the cache


@triton.jit
def let_next_start():
    """By every block; before it nothing is read or written that another kernel has to do with."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


# Of one head of a sequence's cache, or of `part` tokens of it. Where there are several parts, each
# leaves for every head that reads it the sum of its values, its largest logit and the sum of its
# weights, and the last to arrive adds them.
@triton.jit
def attend_kernel(
    queries, cache, out, sums, stats, arrived, length, part, batch_stride, token_stride, scale,
    kv_heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr, rows: tl.constexpr,
    block: tl.constexpr, splits: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    let_next_start()
    pair = tl.program_id(0).to(tl.int64)  # a sequence, and a head of its cache
    split = tl.program_id(1)
    member = tl.arange(0, rows)[:, None]  # of the heads that read it
    at = tl.arange(0, head_dim)[None, :]
    token = tl.arange(0, block)
    head = pair * group + member
    query = tl.load(queries + head * head_dim + at, member < group, other=0.0)
    keys = cache + pair // kv_heads * batch_stride + pair % kv_heads * head_dim + at
    begin = split * part
    end = tl.minimum(begin + part, length)
    largest = tl.full([rows, 1], float("-inf"), tl.float32)
    total = tl.zeros([rows, 1], tl.float32)
    value_sum = tl.zeros([rows, head_dim], tl.float32)
    for first in tl.range(begin, end, block, num_stages=stages):
        inside = first + token < end
        key_at = keys + (first + token)[:, None] * token_stride
        key = tl.load(key_at, inside[:, None], other=0.0)
        value = tl.load(key_at + kv_heads * head_dim, inside[:, None], other=0.0)
        logits = tl.where(inside[None, :], tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1, keep_dims=True))
        weights = tl.exp2(logits - larger)
        kept = tl.exp2(largest - larger)
        total = total * kept + tl.sum(weights, 1, keep_dims=True)
        value_sum = tl.dot(weights.to(value.dtype), value, value_sum * kept)
        largest = larger
    if splits > 1:
        part_of_head = head * splits + split
        tl.store(sums + part_of_head * head_dim + at, value_sum, member < group)
        tl.store(stats + part_of_head * 2, largest, member < group)
        tl.store(stats + part_of_head * 2 + 1, total, member < group)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") < splits - 1:
            return
        tl.store(arrived + pair, 0)  # for the next call
        # The last of a pair's programs adds what all have left, in their order.
        largest = tl.full([rows, 1], float("-inf"), tl.float32)
        for i in tl.static_range(splits):
            of_part = tl.load(stats + (head * splits + i) * 2, member < group, other=0.0)
            largest = tl.maximum(largest, of_part)
        total = tl.zeros([rows, 1], tl.float32)
        value_sum = tl.zeros([rows, head_dim], tl.float32)
        for i in tl.static_range(splits):
            that = head * splits + i
            kept = tl.exp2(tl.load(stats + that * 2, member < group, other=0.0) - largest)
            total += kept * tl.load(stats + that * 2 + 1, member < group, other=1.0)
            value_sum += kept * tl.load(sums + that * head_dim + at, member < group, other=0.0)
    tl.store(out + head * head_dim + at, value_sum / total, member < group)


@functools.cache
def counters(count: int, device: torch.device) -> Tensor:
    """Zeros, which every call leaves as it found them: of calls on one stream, the first of which
    is not captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attend_one: call it once for these sizes before it is captured")
    return torch.zeros(count, dtype=torch.int32, device=device)


def attend_one(queries: Tensor, cache: Tensor) -> Tensor:
    """See :func:`benchmarks.e2e_model.attend`; of one token a sequence.

    A program reads one head of a sequence's cache, or a part of it where multiprocessors would be
    left without. (Llama-3-8B on an H200: 2.0 to 4.5 us a layer less than by cuDNN, of 7 to 37.)
    """
    batch, length, stored_heads, head_dim = cache.shape
    kv_heads, heads = stored_heads // 2, queries.size(2)
    pairs, group = batch * kv_heads, heads // kv_heads
    if group > MOST_HEADS:
        raise ValueError(f"attend_one: {group} heads read one of the cache, more than {MOST_HEADS}")
    if queries.shape != (batch, 1, kv_heads * group, head_dim) or not queries.is_contiguous():
        raise ValueError(
            f"attend_one: queries are {tuple(queries.shape)}; they must be contiguous [{batch}, 1, "
            f"heads, {head_dim}] with heads a multiple of {kv_heads}"
        )
    if length == 0 or cache.stride()[2:] != (head_dim, 1) or length * cache.stride(1) >= 2**31:
        raise ValueError(
            f"attend_one: cache is {tuple(cache.shape)} with strides {cache.stride()}; its heads "
            "must lie side by side, for 1 token or more, below 2^31 elements a sequence"
        )
    room = torch.cuda.get_device_properties(queries.device).multi_processor_count
    block, stages = (128, 3) if pairs <= room else (64, 4)
    splits = max(1, min(room // pairs, triton.cdiv(length, block)))
    part = triton.cdiv(triton.cdiv(length, splits), block) * block
    splits = triton.cdiv(length, part)
    out = queries.new_empty(batch, heads * head_dim)
    sums = queries.new_empty(batch * heads * splits, head_dim, dtype=torch.float32)
    stats = queries.new_empty(batch * heads * splits, 2, dtype=torch.float32)
    attend_kernel[(pairs, splits)](
        queries, cache, out, sums, stats, counters(pairs, queries.device), length, part,
        cache.stride(0), cache.stride(1), math.log2(math.e) / math.sqrt(head_dim),
        kv_heads, group, head_dim, MOST_HEADS, block, splits, stages,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
