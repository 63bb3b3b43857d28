"""A plain decoder of the usual kind: RMSNorm, rotary positions, grouped queries, SwiGLU.

It is the same for every variant: only the linear layers of its blocks differ, and they are fused as
servers fuse them (queries, keys and values in one; gate and up in one). Embeddings and the last
projection to the vocabulary are fp16, as checkpoints keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5
DTYPE = torch.float16
MakeLinear = Callable[[int, int, bool, str], nn.Module]  # (out features, in features, bias, device)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    qkv_bias: bool = False
    head_dim: int = 128
    rotary_base: float = 500_000.0

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """Output features, input features and whether with bias, of the layers of a block."""
        attention = self.heads * self.head_dim
        qkv = attention + 2 * self.kv_heads * self.head_dim
        return {
            "qkv": (qkv, self.hidden, self.qkv_bias),
            "out": (self.hidden, attention, False),
            "gate_up": (2 * self.mlp, self.hidden, False),
            "down": (self.hidden, self.mlp, False),
        }

    def weight_bytes(self, bits: float) -> int:
        """All weights, with so many bits each in the blocks' linear layers."""
        per_block = sum(n * k for n, k, _ in self.linears.values())
        return int(self.layers * per_block * bits / 8) + 2 * 2 * self.vocab * self.hidden

    def cache_bytes(self, batch: int, length: int) -> int:
        """The keys and values of ``batch`` sequences of ``length`` tokens."""
        return self.layers * batch * length * 2 * self.kv_heads * self.head_dim * 2

    def tiny(self) -> Sizes:
        """A model of the same kind for checks."""
        return replace(
            self, hidden=256, layers=2, heads=4, kv_heads=2, mlp=512, vocab=1000, head_dim=64
        )


MODELS = {
    "llama-3-8b": Sizes(4096, 32, 32, 8, 14336, 128256),
    "qwen2.5-32b": Sizes(5120, 64, 40, 8, 27648, 152064, qkv_bias=True, rotary_base=1e6),
    "llama-3-70b": Sizes(8192, 80, 64, 8, 28672, 128256),
}


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``residual + x``, and that sum; all ``[tokens, hidden]``."""
    residual = residual + x
    return F.rms_norm(residual, weight.shape, weight, EPS), residual


def rotary_table(sizes: Sizes, length: int, device: str) -> Tensor:
    """Cosines, and sines with the sign of their half, fp32 ``[length, 2, head_dim]``."""
    powers = torch.arange(0, sizes.head_dim, 2, device=device) / sizes.head_dim
    angles = torch.arange(length, device=device)[:, None] / sizes.rotary_base**powers
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` ``[batch, tokens, heads, head_dim]``, turned; ``angles`` of :func:`rotary_table`."""
    cos, sin = angles.unsqueeze(2).unbind(1)
    other_half = x.roll(x.size(-1) // 2, dims=-1)
    return (x.float() * cos + other_half.float() * sin).to(x.dtype)


def rotate_and_store(qkv: Tensor, rotary: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """Writes keys and values into ``cache``; returns queries ``[batch, tokens, heads, head_dim]``.

    ``qkv`` is ``[batch * tokens, features]``, ``rotary`` :func:`rotary_table`, ``positions``
    ``[tokens]``, ``cache`` ``[batch, length, 2 * kv_heads, head_dim]``.
    """
    batch, _, stored_heads, head_dim = cache.shape
    heads = qkv.view(batch, positions.size(0), -1, head_dim)
    queries, stored = heads.split([heads.size(2) - stored_heads, stored_heads], dim=2)
    angles = rotary[positions]
    # Written so that it compiles to two kernels, one for what is stored and one for the queries.
    is_key = torch.arange(stored_heads, device=cache.device)[:, None] < stored_heads // 2
    cache[:, positions] = torch.where(is_key, rotate(stored, angles), stored)
    return rotate(queries, angles)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[tokens, 2 * mlp]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def choose(logits: Tensor) -> Tensor:
    """The greedy choice of ``[batch, vocab]``, part by part: ``argmax`` of one long row takes 36 us
    on an H200, since one multiprocessor does it."""
    parts = math.gcd(logits.size(-1), 64)
    best, at = logits.unflatten(-1, (parts, -1)).max(dim=-1)
    part = best.argmax(dim=-1, keepdim=True)
    return (part * (logits.size(-1) // parts) + at.gather(-1, part)).squeeze(-1)


def attend(queries: Tensor, cache: Tensor) -> Tensor:
    """Attention over all of ``cache``, to which the queries' own tokens are the last.

    ``queries`` ``[batch, tokens, heads, head_dim]``: one token, or as many as the cache is long.
    Gives ``[batch * tokens, heads * head_dim]``.
    """
    keys, values = cache.transpose(1, 2).chunk(2, dim=1)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, is_causal=queries.size(1) > 1, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Pieces:
    """What lies between the matrix products: as it is, compiled, or in kernels of our own."""

    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotate_and_store: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], Tensor]
    attend_one: Callable[[Tensor, Tensor], Tensor]  # of one token a sequence


PLAIN = Pieces(add_norm, rotate_and_store, swiglu, choose, attend)


def compiled_pieces() -> Pieces:
    """The same by ``torch.compile``, which starts afresh: a model's sizes are constants again.

    Compiled once for one token, and once more for any number of them.
    """
    torch.compiler.reset()
    return Pieces(
        torch.compile(add_norm, fullgraph=True),
        torch.compile(rotate_and_store, fullgraph=True),
        torch.compile(swiglu, fullgraph=True),
        torch.compile(choose, fullgraph=True),
        attend,
    )


def random_parameter(*shape: int, device: str, std: float = 1.0) -> nn.Parameter:
    """Normally distributed, frozen."""
    values = torch.randn(shape, device=device, dtype=DTYPE).mul_(std)
    return nn.Parameter(values, requires_grad=False)


class Block(nn.Module):
    """The weights of one layer."""

    def __init__(self, sizes: Sizes, make_linear: MakeLinear, device: str) -> None:
        super().__init__()
        for name, shape in sizes.linears.items():
            self.add_module(name, make_linear(*shape, device))
        ones = torch.ones(2, sizes.hidden, device=device, dtype=DTYPE)
        self.attention_norm, self.mlp_norm = (
            nn.Parameter(one.clone(), requires_grad=False) for one in ones
        )


class Decoder(nn.Module):
    """A random model whose activations have a variance of about one after every norm."""

    def __init__(self, sizes: Sizes, make_linear: MakeLinear, device: str, max_length: int) -> None:
        super().__init__()
        self.sizes, self.device = sizes, device
        self.embedding = random_parameter(sizes.vocab, sizes.hidden, device=device)
        self.blocks = nn.ModuleList(Block(sizes, make_linear, device) for _ in range(sizes.layers))
        ones = torch.ones(sizes.hidden, device=device, dtype=DTYPE)
        self.norm = nn.Parameter(ones, requires_grad=False)
        self.to_vocab = random_parameter(
            sizes.vocab, sizes.hidden, device=device, std=sizes.hidden**-0.5
        )
        self.register_buffer("rotary", rotary_table(sizes, max_length, device))

    def new_cache(self, batch: int, length: int) -> list[Tensor]:
        """Keys and values of every layer, ``[batch, length, 2 * kv_heads, head_dim]``, random."""
        shape = (batch, length, 2 * self.sizes.kv_heads, self.sizes.head_dim)
        return [
            torch.randn(shape, device=self.device, dtype=DTYPE) for _ in range(self.sizes.layers)
        ]

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: Sequence[Tensor], pieces: Pieces
    ) -> Tensor:
        """The logits ``[batch, vocab]`` that follow ``tokens`` ``[batch, tokens]``.

        ``positions`` ``[tokens]`` are the last of the cache; see :func:`attend`.
        """
        residual = F.embedding(tokens.flatten(), self.embedding)
        norms = [block.attention_norm for block in self.blocks] + [self.norm]
        x = F.rms_norm(residual, norms[0].shape, norms[0], EPS)
        for block, kv, (_, next_norm) in zip(self.blocks, cache, pairwise(norms), strict=True):
            queries = pieces.rotate_and_store(block.qkv(x), self.rotary, positions, kv)
            attention = pieces.attend_one if queries.size(1) == 1 else attend
            x = block.out(attention(queries, kv))
            x, residual = pieces.add_norm(x, residual, block.mlp_norm)
            x = block.down(pieces.swiglu(block.gate_up(x)))
            x, residual = pieces.add_norm(x, residual, next_norm)
        last = x.view(*tokens.shape, -1)[:, -1]
        return F.linear(last, self.to_vocab)
