"""The packed format and the GEMM, written a second time in plain torch: the oracle of the tests.

Nothing here calls the extension. The index maps restate the specification in ``csrc/README.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # a packed block is 64 output features x 64 input features


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _block_maps() -> tuple[Tensor, Tensor]:
    """Row and column, inside a block, of (thread, word, nibble): two int64 tensors [128, 4, 8]."""
    thread = torch.arange(128).view(128, 1, 1)
    word = torch.arange(4).view(1, 4, 1)
    nibble = torch.arange(8).view(1, 1, 8)
    warp, lane = thread // 32, thread % 32
    register, half = nibble % 4, nibble // 4
    row = 16 * warp + lane // 4 + 8 * (register % 2) + 0 * word
    col = 16 * word + 2 * (lane % 4) + half + 8 * (register // 2)
    return row.expand(128, 4, 8), col.expand(128, 4, 8)


ROW, COL = _block_maps()


def _meta_maps() -> tuple[Tensor, Tensor, Tensor]:
    """Row and quad inside a block, and first bit, of metadata's (thread, word, quad of the word,
    half of it): three int64 tensors [128, 2, 4, 2]."""
    thread = torch.arange(128).view(128, 1, 1, 1)
    word = torch.arange(2).view(1, 2, 1, 1)
    quad = torch.arange(4).view(1, 1, 4, 1)
    half = torch.arange(2).view(1, 1, 1, 2)
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    shape = (128, 2, 4, 2)
    row = 16 * warp + g + 8 * half
    first_quad = (32 * (2 * (t // 2) + word) + 16 * (t % 2)) // 4
    bit = 4 * quad + 16 * half
    return row.expand(shape), (first_quad + quad).expand(shape), bit.expand(shape)


META_ROW, META_QUAD, META_BIT = _meta_maps()


def pack(q: Tensor) -> Tensor:
    """uint8 [N, K] of 0..15 -> int32 [ceil(N/64), ceil(K/64), 512]; padding nibbles are 0."""
    n, k = q.shape
    nb, kb = ceil_div(n, BLOCK), ceil_div(k, BLOCK)
    padded = torch.zeros(nb * BLOCK, kb * BLOCK, dtype=torch.int64)
    padded[:n, :k] = q.cpu().long()
    blocks = padded.view(nb, BLOCK, kb, BLOCK).permute(0, 2, 1, 3)
    nibbles = blocks[:, :, ROW, COL]  # [nb, kb, 128, 4, 8]
    word = (nibbles << (4 * torch.arange(8))).sum(-1)
    word = ((word << 2) | (word >> 30)) & 0xFFFFFFFF  # rotate left by 2
    word = torch.where(word >= 2**31, word - 2**32, word)
    return word.to(torch.int32).reshape(nb, kb, 512).to(q.device)


def unpack(qweight: Tensor, n: int, k: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [n, k]."""
    nb, kb, _ = qweight.shape
    word = qweight.cpu().long().view(nb, kb, 128, 4) & 0xFFFFFFFF
    word = ((word >> 2) | (word << 30)) & 0xFFFFFFFF  # rotate right by 2
    nibbles = (word.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    blocks = torch.zeros(nb, kb, BLOCK, BLOCK, dtype=torch.int64)
    blocks[:, :, ROW, COL] = nibbles
    q = blocks.permute(0, 2, 1, 3).reshape(nb * BLOCK, kb * BLOCK)
    return q[:n, :k].to(torch.uint8).to(qweight.device)


def stored_places(mask: Tensor) -> Tensor:
    """Which two of every four of bool [N, K] are stored: their places, int64 [N, K/4, 2], rising.

    Those that are kept and, where they are fewer than two, the first of the others.
    """
    n, k = mask.shape
    order = (~mask.cpu().view(n, k // 4, 4)).long() * 4 + torch.arange(4)
    return (order.sort(-1).values[..., :2] % 4).sort(-1).values


def pack_24(q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 and bool [N, K] -> int32 [ceil(N/64), ceil(K/128), 512] and [.., .., 256]."""
    n, k = q.shape
    nb, kb = ceil_div(n, BLOCK), ceil_div(k, 2 * BLOCK)
    places = torch.tensor([0, 1]).repeat(nb * BLOCK, kb * 32, 1)
    places[:n, : k // 4] = stored_places(mask)
    values = torch.zeros(nb * BLOCK, kb * 32, 4, dtype=torch.uint8)
    values[:n, : k // 4] = q.cpu().view(n, k // 4, 4)
    survivors = values.gather(2, places).view(nb * BLOCK, kb * BLOCK)

    nibbles = (places[..., 0] | places[..., 1] << 2).view(nb, BLOCK, kb, 32).transpose(1, 2)
    meta = (nibbles[:, :, META_ROW, META_QUAD] << META_BIT).sum((-2, -1))
    meta = torch.where(meta >= 2**31, meta - 2**32, meta).to(torch.int32)
    return pack(survivors), meta.view(nb, kb, 256)


def places_of(meta: Tensor, n: int, k: int) -> Tensor:
    """The places that :func:`pack_24` wrote: int64 [N, K/4, 2]."""
    nb, kb, _ = meta.shape
    words = meta.long().view(nb, kb, 128, 2) & 0xFFFFFFFF
    nibbles = words[..., None, None] >> META_BIT & 15
    places = torch.empty(nb, kb, 64, 32, 2, dtype=torch.int64)
    places[:, :, META_ROW, META_QUAD] = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
    return places.transpose(1, 2).reshape(nb * 64, kb * 32, 2)[:n, : k // 4]


def group_size_of(k: int, groups: int) -> int:
    """32, 64, 128, or -1 for one group."""
    if groups == 1:
        return -1
    sizes = [g for g in (32, 64, 128) if ceil_div(k, g) == groups]
    if len(sizes) != 1:
        raise ValueError(f"{groups} groups do not fit k={k}")
    return sizes[0]


def group_of_column(k: int, groups: int) -> Tensor:
    """The group of each packed column: int64 [k]."""
    return torch.arange(k) // (k if groups == 1 else group_size_of(k, groups))


def dequantize64(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, k: int
) -> Tensor:
    """The weight as fp64 [N, K], in the order of the layer's own input features."""
    n = scales.size(1)
    q = unpack(qweight, n, k).cpu().double()
    group = group_of_column(k, scales.size(0))
    z = 8.0 if zeros is None else zeros.cpu().double()[group].T
    w = (q - z) * scales.cpu().double()[group].T
    if perm is not None:
        restored = torch.empty_like(w)
        restored[:, perm.cpu().long()] = w
        w = restored
    return w.to(qweight.device)


def gemm64(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] times the dequantised weight, in fp64: [..., N]."""
    y = x.double() @ dequantize64(qweight, scales, zeros, perm, x.size(-1)).T.to(x.device)
    return y if bias is None else y + bias.double()


def gptq_pack(q: Tensor) -> Tensor:
    """uint8 [N, K] -> GPTQ ``qweight``, int32 [K/8, N]: nibble i of word (r, n) is q[n, 8r + i]."""
    n, k = q.shape
    words = (q.cpu().long().T.reshape(k // 8, 8, n) << (4 * torch.arange(8)).view(1, 8, 1)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_pack(q: Tensor) -> Tensor:
    """uint8 [N, K] -> an AWQ ``qweight``, int32 [K, N/8]: nibble i is column 8c + AWQ_ORDER[i]."""
    n, k = q.shape
    columns = q.cpu().long().T.reshape(k, n // 8, 8)[:, :, AWQ_ORDER]
    words = (columns << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


# How far a GEMM may be from fp64, element by element. The output is rounded once, to nearest: half
# a unit in the last place of fp16 (2^-11 relative, 2^-25 absolute among subnormals) or bf16 (2^-8,
# 2^-134). Sums are fp32. The CPU adds K terms one by one, a tensor core 16 at a time, truncating;
# (K / 16 + 16) * 2^-23 of the sum of magnitudes is several times what either does on random data.
def error_bound(reference: Tensor, magnitudes: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The largest allowed |y - reference|; ``magnitudes`` is |x| times |w|^T, in fp64."""
    relative, absolute = (2**-11, 2**-25) if dtype == torch.float16 else (2**-8, 2**-134)
    accumulated = (k / 16 + 16) * 2**-23 * magnitudes
    return relative * (reference.abs() + accumulated) + absolute + accumulated


def rms(t: Tensor) -> float:
    """The root of the mean square."""
    return float(t.double().square().mean().sqrt())


def rounds_weights(m: int, n: int, k: int, *, group_size: int = 128, sparse: bool = False) -> bool:
    """Whether the GEMM that the planner takes on this GPU rounds weights to the inputs' type."""
    from marlin import _inspect

    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties().multi_processor_count
    plan = _inspect.plan_for(
        m, n, k, group_size=group_size, sparse=sparse, sm=10 * major + minor, sms=sms
    )
    return bool(plan["rounds_weights"])


def kernel_rounds(kernel: dict[str, Any], group_size: int) -> bool:
    """The same of one kernel of ``_inspect.plans()``."""
    return (128 if group_size == -1 else group_size) in kernel["rounds_groups"]


def assert_close(
    y: Tensor,
    x: Tensor,
    weight64: Tensor,
    bias: Tensor | None = None,
    *,
    rounded: bool | None = None,
    group_size: int = 128,
    sparse: bool = False,
) -> None:
    """y against x times the fp64 weight [N, K].

    Element by element within :func:`error_bound`; and as a whole within 1.1 times the error of
    rounding the exact result once, which a second rounding on the way (1.4 times) would exceed.
    Where the kernel multiplies weights ``rounded`` to x's type, as ``dequantize`` returns them, the
    reference does so too. None: as :func:`rounds_weights` says, of a weight with groups of
    ``group_size``, 2:4 ``sparse`` or not.
    """
    x64, w64 = x.double(), weight64.to(x.device)
    if rounded is None:
        rows = y.numel() // max(y.size(-1), 1)
        rounded = (
            x.is_cuda
            and rows > 0
            and rounds_weights(rows, *weight64.shape, group_size=group_size, sparse=sparse)
        )
    if rounded:
        w64 = w64.float().to(x.dtype).double()
    reference, magnitudes = x64 @ w64.T, x64.abs() @ w64.abs().T
    if bias is not None:
        reference, magnitudes = reference + bias.double(), magnitudes + bias.double().abs()
    if y.numel() == 0:
        return
    bound = error_bound(reference, magnitudes, x.size(-1), y.dtype)
    error = (y.double() - reference).abs()
    worst = (error / bound).nan_to_num(nan=float("inf")).flatten().argmax()
    if not bool((error <= bound).flatten()[worst]):
        where = [int(i) for i in torch.unravel_index(worst, y.shape)]
        raise AssertionError(
            f"y{where} = {y.flatten()[worst].item()}, reference "
            f"{reference.flatten()[worst].item()}, error {error.flatten()[worst].item():.3e} > "
            f"bound {bound.flatten()[worst].item():.3e}; shape {list(y.shape)}, K = {x.size(-1)}"
        )
    if y.numel() >= 256:
        allowed = 1.1 * rms(reference.to(y.dtype).double() - reference) + 2**-21 * rms(magnitudes)
        assert rms(error) <= allowed, f"rms error {rms(error):.3e} > {allowed:.3e}: rounded twice?"
