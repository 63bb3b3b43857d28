"""Random operands for the tests, and what a test needs to say about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import reference
import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, -1)
DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class Weight:
    """The tensors of a packed weight and its integers ``q``, uint8 [N, K]."""

    q: Tensor
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: Tensor | None

    @property
    def k(self) -> int:
        return self.q.size(1)

    @property
    def group_size(self) -> int:
        return reference.group_size_of(self.k, self.scales.size(0))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the op takes after the input."""
        return self.qweight, self.scales, self.zeros, self.perm, self.bias

    def gemm(self, x: Tensor, *, static_weights: bool = False) -> Tensor:
        return torch.ops.marlin.gemm(x, *self.tensors, static_weights=static_weights)

    def dense64(self) -> Tensor:
        return reference.dequantize64(self.qweight, self.scales, self.zeros, self.perm, self.k)


def groups_of(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else reference.ceil_div(k, group_size)


def make_weight(
    n: int,
    k: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    zeros: bool = False,
    perm: bool = False,
    bias: bool = False,
    integers: bool = False,
    seed: int = 0,
) -> Weight:
    """A random weight. ``integers``: scales are powers of two, so that products with integers and
    their sums are exact."""
    g = torch.Generator().manual_seed(seed)
    groups = groups_of(k, group_size)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    scales = torch.rand(groups, n, generator=g) * 0.02 + 0.001
    if integers:
        scales = 2.0 ** torch.randint(-2, 3, (groups, n), generator=g)
    tensors = {
        "q": q,
        "qweight": reference.pack(q),
        "scales": scales.to(dtype),
        "zeros": torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=g),
        "perm": torch.randperm(k, generator=g).int(),
        "bias": torch.randn(n, generator=g).to(dtype),
    }
    if integers:
        tensors["bias"] = torch.randint(-8, 9, (n,), generator=g).to(dtype)
    wanted = {"zeros": zeros, "perm": perm, "bias": bias}
    return Weight(
        **{name: t.to(device) if wanted.get(name, True) else None for name, t in tensors.items()}
    )


def make_input(
    m: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    integers: bool = False,
    seed: int = 1,
) -> Tensor:
    """Random activations. ``integers``: of -2 to 2, for weights of the same option."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (m, k), generator=g) if integers else torch.randn(m, k, generator=g)
    return x.to(dtype).to(device)


@dataclass
class Weight24:
    """The tensors of a 2:4 sparse weight, and the same weight dense: fp64 [N, K], on the CPU."""

    dense: Tensor
    qweight: Tensor
    meta: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    @property
    def group_size(self) -> int:
        return reference.group_size_of(self.dense.size(1), self.scales.size(0))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the op takes after the input."""
        return self.qweight, self.meta, self.scales, self.zeros, self.bias

    def gemm(self, x: Tensor, *, static_weights: bool = False) -> Tensor:
        return torch.ops.marlin.gemm_24(x, *self.tensors, static_weights=static_weights)

    def dense64(self) -> Tensor:
        return self.dense.to(self.qweight.device)

    def gemm64(self, x: Tensor) -> Tensor:
        y = x.double() @ self.dense64().T
        return y if self.bias is None else y + self.bias.double()


def make_weight_24(
    n: int,
    k: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    zeros: bool = False,
    bias: bool = False,
    integers: bool = False,
    seed: int = 0,
) -> Weight24:
    """A random 2:4 weight, as :func:`make_weight` makes a dense one."""
    q, mask = random_24(n, k, seed)
    g = torch.Generator().manual_seed(seed)
    groups = groups_of(k, group_size)
    scales = torch.rand(groups, n, generator=g) * 0.02 + 0.001
    if integers:
        scales = 2.0 ** torch.randint(-2, 3, (groups, n), generator=g)
    scales = scales.to(dtype)
    points = torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=g)
    group = reference.group_of_column(k, groups)
    zero = points.double()[group].T if zeros else 8.0
    dense = torch.where(stored(mask), (q.double() - zero) * scales.double()[group].T, 0.0)
    qweight, meta = reference.pack_24(q, mask)
    tensors = {
        "qweight": qweight,
        "meta": meta,
        "scales": scales,
        "zeros": points if zeros else None,
        "bias": torch.randint(-8, 9, (n,), generator=g).to(dtype) if bias else None,
    }
    return Weight24(
        dense,
        **{name: None if t is None else t.to(device, copy=True) for name, t in tensors.items()},
    )


# Either kind of weight, and every option that it has.
Maker = Callable[..., Weight | Weight24]
ALL_OPTIONS: dict[Maker, dict[str, bool]] = {
    make_weight: {"zeros": True, "perm": True, "bias": True},
    make_weight_24: {"zeros": True, "bias": True},
}


def random_24(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Integers, and a mask that keeps none, one or two of every four."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    rank = torch.rand(n, k // 4, 4, generator=g).argsort(-1).argsort(-1)
    kept = torch.randint(0, 3, (n, k // 4, 1), generator=g)
    return q, (rank < kept).view(n, k)


def stored(mask: Tensor) -> Tensor:
    """bool [N, K]: which weights are stored."""
    n, k = mask.shape
    out = torch.zeros(n, k // 4, 4, dtype=torch.bool)
    return out.scatter(2, reference.stored_places(mask), True).view(n, k)
