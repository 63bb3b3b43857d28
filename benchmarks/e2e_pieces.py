"""What lies between matrix products, in kernels that let the next one start early.

With programmatic dependent launch a kernel's blocks can be set up, and 4-bit products fetch
weights, while the kernel before still runs, if that one allows it. Kernels by ``torch.compile``
don't, or, with ``triton.enable_pdl``, once they have read everything: these do before anything
else. Each then waits for all kernels before it, so that one that has ended says that they all have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.e2e_attention import attend_one, let_next_start
from benchmarks.e2e_model import EPS, Pieces, choose


@triton.jit
def add_norm_kernel(
    x, residual, weight, normed, total, eps, columns: tl.constexpr, block: tl.constexpr
):
    let_next_start()
    column = tl.arange(0, block)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    values = tl.load(x + at, inside, other=0.0) + tl.load(residual + at, inside, other=0.0)
    tl.store(total + at, values, inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    tl.store(normed + at, wide * scale * tl.load(weight + column, inside, other=0.0), inside)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`benchmarks.e2e_model.add_norm`; a program does a row, by all threads it can have.

    (A block of Qwen2.5-32B, 16 tokens, takes 100 us on an H200; with a quarter of them, 106.)
    """
    normed, total = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    add_norm_kernel[(rows,)](
        x, residual, weight, normed, total, EPS, columns, triton.next_power_of_2(columns),
        num_warps=32, launch_pdl=True,
    )  # fmt: skip
    return normed, total


@triton.jit
def rotate_and_store_kernel(
    qkv, rotary, positions, queries, cache, cache_batch_stride, cache_token_stride, tokens,
    heads: tl.constexpr, stored_heads: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    let_next_start()
    row = tl.program_id(0).to(tl.int64)  # of all sequences' tokens
    position = tl.load(positions + row % tokens)
    head = tl.program_id(1) * block + tl.arange(0, block)[:, None]
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, half)[None, :]
    cos = tl.load(rotary + position * 2 * head_dim + at)
    sin = tl.load(rotary + position * 2 * head_dim + head_dim + half + at)
    first_at = head * head_dim + at
    inside = head < heads
    first = tl.load(qkv + row * heads * head_dim + first_at, inside)
    second = tl.load(qkv + row * heads * head_dim + first_at + half, inside)
    is_value = head >= heads - stored_heads // 2
    new_first = tl.where(is_value, first, first * cos - second * sin)
    new_second = tl.where(is_value, second, second * cos + first * sin)
    query_heads: tl.constexpr = heads - stored_heads
    is_query = head < query_heads
    query = queries + row * query_heads * head_dim + first_at
    tl.store(query, new_first, is_query)
    tl.store(query + half, new_second, is_query)
    stored = cache + row // tokens * cache_batch_stride + position * cache_token_stride
    stored += first_at - query_heads * head_dim
    tl.store(stored, new_first, inside & (head >= query_heads))
    tl.store(stored + half, new_second, inside & (head >= query_heads))


def rotate_and_store(qkv: Tensor, rotary: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """See :func:`benchmarks.e2e_model.rotate_and_store`; a program does eight heads of a token."""
    batch, _, stored_heads, head_dim = cache.shape
    tokens, heads, block = positions.size(0), qkv.size(1) // head_dim, 8
    queries = qkv.new_empty(batch, tokens, heads - stored_heads, head_dim)
    rotate_and_store_kernel[(batch * tokens, triton.cdiv(heads, block))](
        qkv, rotary, positions, queries, cache, cache.stride(0), cache.stride(1), tokens,
        heads, stored_heads, head_dim, block, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return queries


@triton.jit
def swiglu_kernel(gate_up, out, columns, block: tl.constexpr):
    let_next_start()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    gate = tl.load(gate_up + row * 2 * columns + column, inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + column, inside).to(tl.float32)
    tl.store(out + row * columns + column, gate * tl.sigmoid(gate) * up, inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """See :func:`benchmarks.e2e_model.swiglu`; a program does 512 columns of a token."""
    rows, columns, block = gate_up.size(0), gate_up.size(1) // 2, 512
    out = gate_up.new_empty(rows, columns)
    swiglu_kernel[(rows, triton.cdiv(columns, block))](
        gate_up, out, columns, block, num_warps=4, launch_pdl=True
    )
    return out


def early_pieces() -> Pieces:
    """These, and the choice by `torch.compile`: after the last product nothing starts early."""
    torch.compiler.reset()
    compiled_choose = torch.compile(choose, fullgraph=True)
    return Pieces(add_norm, rotate_and_store, swiglu, compiled_choose, attend_one)
