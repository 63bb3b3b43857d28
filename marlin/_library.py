"""Loads the compiled ops and completes them: fake kernels and the gradient of the activation.

The stable ABI has no symbolic sizes, so the fake kernels are Python. Their checks are those of
``csrc/ops/checks.cpp``, message for message (``tests/test_ops_errors.py`` compares the two).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_ops.abi3.so")
BLOCK = 64
SPARSE_COLUMNS = 128  # of a block of a 2:4 sparse weight
WORDS_PER_BLOCK = 512
META_WORDS_PER_BLOCK = 256


def _load() -> None:
    if not LIBRARY.exists():
        raise ImportError(
            f"marlin: {LIBRARY.name} is not beside {Path(__file__).name}; "
            "build it with `pip install .` or `pip install -e .` in the source tree"
        )
    torch.ops.load_library(str(LIBRARY))


_load()


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_dtype(op: str, name: str, t: Tensor, wanted: torch.dtype) -> None:
    wanted_name = str(wanted).removeprefix("torch.")
    _check(t.dtype == wanted, f"marlin::{op}: {name} must be {wanted_name}, got {_dtype(t)}")


def _check_dim(op: str, name: str, t: Tensor, dim: int, layout: str) -> None:
    _check(t.dim() == dim, f"marlin::{op}: {name} must have shape {layout}, got {_shape(t)}")


def _check_contiguous(op: str, name: str, t: Tensor) -> None:
    message = f"marlin::{op}: {name} must be contiguous; call {name}.contiguous()"
    _check(t.is_contiguous(), message)


def _check_same_device(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    _check(
        t.device == other.device,
        f"marlin::{op}: {name} is on {t.device} but {other_name} is on {other.device}; "
        "move them to one device",
    )


def _check_not_empty(op: str, name: str, t: Tensor) -> None:
    _check(t.numel() > 0, f"marlin::{op}: {name} must not be empty, got {_shape(t)}")


def _check_packed(op: str, qweight: Tensor, *, sparse: bool = False) -> None:
    _check_dtype(op, "qweight", qweight, torch.int32)
    columns = SPARSE_COLUMNS if sparse else BLOCK
    makers = "pack_24" if sparse else "pack, repack_gptq or repack_awq"
    _check(
        qweight.dim() == 3 and qweight.size(2) == WORDS_PER_BLOCK,
        f"marlin::{op}: qweight must have shape [ceil(N/64), ceil(K/{columns}), 512], got "
        f"{_shape(qweight)}; make it with {makers}",
    )
    _check_contiguous(op, "qweight", qweight)


def _check_meta(op: str, meta: Tensor, qweight: Tensor) -> None:
    _check_dtype(op, "meta", meta, torch.int32)
    wanted = [qweight.size(0), qweight.size(1), META_WORDS_PER_BLOCK]
    _check(
        list(meta.shape) == wanted,
        f"marlin::{op}: meta must have shape {wanted}, as qweight, got {_shape(meta)}; make both "
        "with pack_24",
    )
    _check_contiguous(op, "meta", meta)
    _check_same_device(op, "meta", meta, "qweight", qweight)


def _check_quads(op: str, name: str, k: int) -> None:
    _check(k % 4 == 0, f"marlin::{op}: {name} must be a multiple of 4, got {k}")


def group_size_of(groups: int, k: int) -> int:
    """The group size of a weight with ``groups`` rows of scales over ``k`` columns; 0: none."""
    if groups == 1:
        return k
    return next((size for size in (32, 64, 128) if ceil_div(k, size) == groups), 0)


def _check_weight(
    op: str,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    k: int,
    *,
    sparse: bool = False,
) -> int:
    _check_packed(op, qweight, sparse=sparse)
    columns = SPARSE_COLUMNS if sparse else BLOCK
    _check(
        scales.dtype in (torch.float16, torch.bfloat16),
        f"marlin::{op}: scales must be float16 or bfloat16, got {_dtype(scales)}",
    )
    _check_dim(op, "scales", scales, 2, "[G, N]")
    _check_contiguous(op, "scales", scales)
    _check_same_device(op, "scales", scales, "qweight", qweight)
    groups, n = scales.shape
    _check(
        n >= 1 and ceil_div(n, BLOCK) == qweight.size(0),
        f"marlin::{op}: scales has N = {n} columns, but qweight {_shape(qweight)} holds "
        f"{qweight.size(0)} blocks of 64 output features",
    )
    _check(
        k >= 1 and ceil_div(k, columns) == qweight.size(1),
        f"marlin::{op}: qweight {_shape(qweight)} holds {qweight.size(1)} blocks of {columns} "
        f"input features, but K = {k}",
    )
    _check(
        n < 2**30 and k < 2**30,
        f"marlin::{op}: qweight is for N = {n}, K = {k}; each must be below 2^30",
    )
    _check(
        group_size_of(groups, k) != 0,
        f"marlin::{op}: scales has G = {groups} groups, but K = {k} makes 1, or {ceil_div(k, 32)}, "
        f"{ceil_div(k, 64)} or {ceil_div(k, 128)} for group sizes 32, 64 and 128",
    )
    if zeros is not None:
        _check_dtype(op, "zeros", zeros, torch.uint8)
        _check(
            zeros.shape == scales.shape,
            f"marlin::{op}: zeros must have the shape of scales, {_shape(scales)}, got "
            f"{_shape(zeros)}",
        )
        _check_contiguous(op, "zeros", zeros)
        _check_same_device(op, "zeros", zeros, "qweight", qweight)
    if perm is not None:
        _check_perm(op, perm, k, qweight)
    return n


def _check_perm(op: str, perm: Tensor, k: int, qweight: Tensor) -> None:
    _check_dtype(op, "perm", perm, torch.int32)
    _check(
        perm.dim() == 1 and perm.size(0) == k,
        f"marlin::{op}: perm must have shape [K] = [{k}], got {_shape(perm)}",
    )
    _check_contiguous(op, "perm", perm)
    _check_same_device(op, "perm", perm, "qweight", qweight)


def _gemm_output(
    op: str,
    input: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    *,
    sparse: bool = False,
) -> Tensor:
    """What a gemm of these arguments returns, once they are checked."""
    _check(
        input.dtype in (torch.float16, torch.bfloat16),
        f"marlin::{op}: input must be float16 or bfloat16, got {_dtype(input)}; cast it, "
        "e.g. input.to(scales.dtype)",
    )
    _check(
        input.dim() >= 1,
        f"marlin::{op}: input must have shape [..., K], got a tensor without dimensions",
    )
    _check(
        scales.dtype == input.dtype,
        f"marlin::{op}: scales must have the dtype of input, {_dtype(input)}, got {_dtype(scales)}",
    )
    _check_same_device(op, "input", input, "qweight", qweight)
    _check(
        input.size(-1) <= 1 or input.stride(-1) == 1,
        f"marlin::{op}: input must have stride 1 along its last dimension, got "
        f"{input.stride(-1)}; call input.contiguous()",
    )
    n = _check_weight(op, qweight, scales, zeros, perm, input.size(-1), sparse=sparse)
    if bias is not None:
        _check_dtype(op, "bias", bias, input.dtype)
        _check(
            bias.dim() == 1 and bias.size(0) == n,
            f"marlin::{op}: bias must have shape [N] = [{n}], got {_shape(bias)}",
        )
        _check_contiguous(op, "bias", bias)
        _check_same_device(op, "bias", bias, "input", input)
    return input.new_empty([*input.shape[:-1], n])


@torch.library.register_fake("marlin::gemm")
def _gemm_fake(
    input: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    static_weights: bool = False,
) -> Tensor:
    return _gemm_output("gemm", input, qweight, scales, zeros, perm, bias)


@torch.library.register_fake("marlin::gemm_24")
def _gemm_24_fake(
    input: Tensor,
    qweight: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    static_weights: bool = False,
) -> Tensor:
    _check_packed("gemm_24", qweight, sparse=True)
    _check_meta("gemm_24", meta, qweight)
    if input.dim() >= 1:
        _check_quads("gemm_24", "K of input", input.size(-1))
    return _gemm_output("gemm_24", input, qweight, scales, zeros, None, bias, sparse=True)


def _new_packed(like: Tensor, n: int, k: int) -> Tensor:
    shape = (ceil_div(n, BLOCK), ceil_div(k, BLOCK), WORDS_PER_BLOCK)
    return like.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("marlin::pack")
def _pack_fake(q: Tensor) -> Tensor:
    _check_dtype("pack", "q", q, torch.uint8)
    _check_dim("pack", "q", q, 2, "[N, K]")
    _check_not_empty("pack", "q", q)
    _check_contiguous("pack", "q", q)
    return _new_packed(q, q.size(0), q.size(1))


@torch.library.register_fake("marlin::unpack")
def _unpack_fake(qweight: Tensor, n: int, k: int) -> Tensor:
    _check_packed("unpack", qweight)
    fits = n >= 1 and ceil_div(n, BLOCK) == qweight.size(0)
    fits = fits and k >= 1 and ceil_div(k, BLOCK) == qweight.size(1)
    _check(
        fits,
        f"marlin::unpack: n = {n}, k = {k} do not fit qweight {_shape(qweight)}, which is "
        "[ceil(n/64), ceil(k/64), 512]",
    )
    return qweight.new_empty((n, k), dtype=torch.uint8)


@torch.library.register_fake("marlin::repack_gptq")
def _repack_gptq_fake(qweight: Tensor, perm: Tensor | None = None) -> Tensor:
    _check_dtype("repack_gptq", "qweight", qweight, torch.int32)
    _check_dim("repack_gptq", "qweight", qweight, 2, "[K/8, N]")
    _check_not_empty("repack_gptq", "qweight", qweight)
    _check_contiguous("repack_gptq", "qweight", qweight)
    n, k = qweight.size(1), qweight.size(0) * 8
    if perm is not None:
        _check_perm("repack_gptq", perm, k, qweight)
    return _new_packed(qweight, n, k)


@torch.library.register_fake("marlin::repack_awq")
def _repack_awq_fake(qweight: Tensor) -> Tensor:
    _check_dtype("repack_awq", "qweight", qweight, torch.int32)
    _check_dim("repack_awq", "qweight", qweight, 2, "[K, N/8]")
    _check_not_empty("repack_awq", "qweight", qweight)
    _check_contiguous("repack_awq", "qweight", qweight)
    return _new_packed(qweight, qweight.size(1) * 8, qweight.size(0))


@torch.library.register_fake("marlin::dequantize")
def _dequantize_fake(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    k: int | None = None,
) -> Tensor:
    _check_packed("dequantize", qweight)
    columns = qweight.size(1) * BLOCK if k is None else k
    n = _check_weight("dequantize", qweight, scales, zeros, perm, columns)
    return scales.new_empty((n, columns))


@torch.library.register_fake("marlin::pack_24")
def _pack_24_fake(q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    op = "pack_24"
    _check_dtype(op, "q", q, torch.uint8)
    _check_dim(op, "q", q, 2, "[N, K]")
    _check_not_empty(op, "q", q)
    _check_contiguous(op, "q", q)
    _check_quads(op, "K of q", q.size(1))
    _check_dtype(op, "mask", mask, torch.bool)
    _check(
        mask.shape == q.shape,
        f"marlin::{op}: mask must have the shape of q, {_shape(q)}, got {_shape(mask)}",
    )
    _check_contiguous(op, "mask", mask)
    _check_same_device(op, "mask", mask, "q", q)
    blocks = ceil_div(q.size(0), BLOCK), ceil_div(q.size(1), SPARSE_COLUMNS)
    return (
        q.new_empty((*blocks, WORDS_PER_BLOCK), dtype=torch.int32),
        q.new_empty((*blocks, META_WORDS_PER_BLOCK), dtype=torch.int32),
    )


@torch.library.register_fake("marlin::unpack_24")
def _unpack_24_fake(qweight: Tensor, meta: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    _check_packed("unpack_24", qweight, sparse=True)
    _check_meta("unpack_24", meta, qweight)
    _check_quads("unpack_24", "k", k)
    fits = n >= 1 and ceil_div(n, BLOCK) == qweight.size(0)
    fits = fits and k >= 1 and ceil_div(k, SPARSE_COLUMNS) == qweight.size(1)
    _check(
        fits,
        f"marlin::unpack_24: n = {n}, k = {k} do not fit qweight {_shape(qweight)}, which is "
        "[ceil(n/64), ceil(k/128), 512]",
    )
    q = qweight.new_empty((n, k), dtype=torch.uint8)
    return q, qweight.new_empty((n, k), dtype=torch.bool)


@torch.library.register_fake("marlin::dequantize_24")
def _dequantize_24_fake(
    qweight: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    k: int | None = None,
) -> Tensor:
    _check_packed("dequantize_24", qweight, sparse=True)
    _check_meta("dequantize_24", meta, qweight)
    columns = qweight.size(1) * SPARSE_COLUMNS if k is None else k
    _check_quads("dequantize_24", "k", columns)
    n = _check_weight("dequantize_24", qweight, scales, zeros, None, columns, sparse=True)
    return scales.new_empty((n, columns))


def _gemm_setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    input, *weight, bias = inputs
    ctx.save_for_backward(*weight)
    ctx.in_features = input.size(-1)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, grad: Tensor, dequantize: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the activation, and of the bias; packed weights are constants."""
    weight = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = grad @ dequantize(*weight, k=ctx.in_features)
    if ctx.has_bias and ctx.needs_input_grad[-1]:
        grad_bias = grad.reshape(-1, grad.size(-1)).sum(0)
    return grad_input, *[None for _ in weight], grad_bias


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, torch.ops.marlin.dequantize)


def _gemm_24_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, torch.ops.marlin.dequantize_24)


for _op, _backward in (("gemm", _gemm_backward), ("gemm_24", _gemm_24_backward)):
    torch.library.register_autograd(f"marlin::{_op}", _backward, setup_context=_gemm_setup_context)
