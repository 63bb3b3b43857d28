"""Every wrong argument of every op: a RuntimeError that names the op and the argument, says what it
got and the rule, and is the same, word for word, from the compiled op and from its fake kernel."""

# The tables below are one case a line.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import operands
import pytest
import reference
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.marlin
N, K = 72, 136


def gemm_arguments() -> dict[str, Any]:
    w = operands.make_weight(N, K, 32, zeros=True, perm=True, bias=True)
    x = operands.make_input(4, K, dtype=torch.float16)
    return {
        "input": x, "qweight": w.qweight, "scales": w.scales, "zeros": w.zeros, "perm": w.perm,
        "bias": w.bias,
    }  # fmt: skip


def dequantize_arguments() -> dict[str, Any]:
    arguments = gemm_arguments()
    return {key: arguments[key] for key in ("qweight", "scales", "zeros", "perm")} | {"k": K}


def pack_arguments() -> dict[str, Any]:
    return {"q": torch.zeros(N, K, dtype=torch.uint8)}


def unpack_arguments() -> dict[str, Any]:
    return {"qweight": gemm_arguments()["qweight"], "n": N, "k": K}


def gptq_arguments() -> dict[str, Any]:
    q = torch.zeros(N, K, dtype=torch.uint8)
    return {"qweight": reference.gptq_pack(q), "perm": torch.randperm(K).int()}


def awq_arguments() -> dict[str, Any]:
    return {"qweight": reference.awq_pack(torch.zeros(N, K, dtype=torch.uint8))}


def pack_24_arguments() -> dict[str, Any]:
    mask = torch.tensor([True, False, True, False]).repeat(N, K // 4)
    return {"q": torch.zeros(N, K, dtype=torch.uint8), "mask": mask}


def unpack_24_arguments() -> dict[str, Any]:
    qweight, meta = reference.pack_24(**pack_24_arguments())
    return {"qweight": qweight, "meta": meta, "n": N, "k": K}


def dequantize_24_arguments() -> dict[str, Any]:
    packed, dense = unpack_24_arguments(), gemm_arguments()
    return {
        "qweight": packed["qweight"], "meta": packed["meta"], "scales": dense["scales"],
        "zeros": dense["zeros"], "k": K,
    }  # fmt: skip


def transposed(t: Tensor) -> Tensor:
    """The same values and shape, other strides."""
    return t.mT.contiguous().mT


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def misaligned(t: Tensor) -> Tensor:
    """The same values, starting 4 bytes past an aligned address."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


Change = Callable[[dict[str, Any]], dict[str, Any]]


def change(name: str, f: Callable[[Any], Any]) -> Change:
    return lambda arguments: arguments | {name: f(arguments[name])}


# (op, arguments, what is changed, what the message must say)
CASES: list[tuple[str, Callable[[], dict[str, Any]], Change, str]] = [
    ("gemm", gemm_arguments, change("input", Tensor.float), r"input must be float16 or bfloat16, got float32; cast it"),
    ("gemm", gemm_arguments, change("input", Tensor.int), r"input must be float16 or bfloat16, got int32"),
    ("gemm", gemm_arguments, change("input", lambda t: t[0, 0]), r"input must have shape \[\.\.\., K\]"),
    ("gemm", gemm_arguments, change("input", Tensor.bfloat16), r"scales must have the dtype of input, bfloat16, got float16"),
    ("gemm", gemm_arguments, change("input", strided), r"input must have stride 1 along its last dimension, got 2; call input\.contiguous"),
    ("gemm", gemm_arguments, change("input", lambda t: t[:, :64].contiguous()), r"qweight \[2, 3, 512\] holds 3 blocks of 64 input features, but K = 64"),
    ("gemm", gemm_arguments, change("input", lambda t: t[:, :0]), r"but K = 0"),
    ("gemm", gemm_arguments, change("qweight", Tensor.long), r"qweight must be int32, got int64"),
    ("gemm", gemm_arguments, change("qweight", lambda t: t[0]), r"qweight must have shape \[ceil\(N/64\), ceil\(K/64\), 512\], got \[3, 512\]; make it with pack"),
    ("gemm", gemm_arguments, change("qweight", lambda t: t[..., :256]), r"qweight must have shape .*, got \[2, 3, 256\]"),
    ("gemm", gemm_arguments, change("qweight", strided), r"qweight must be contiguous; call qweight\.contiguous"),
    ("gemm", gemm_arguments, change("qweight", lambda t: t[:1]), r"scales has N = 72 columns, but qweight \[1, 3, 512\] holds 1 blocks of 64 output features"),
    ("gemm", gemm_arguments, change("scales", lambda t: t[0]), r"scales must have shape \[G, N\], got \[72\]"),
    ("gemm", gemm_arguments, change("scales", transposed), r"scales must be contiguous"),
    ("gemm", gemm_arguments, change("scales", lambda t: t[:, :0]), r"scales has N = 0 columns"),
    ("gemm", gemm_arguments, change("scales", lambda t: t[:4]), r"scales has G = 4 groups, but K = 136 makes 1, or 5, 3 or 2 for group sizes 32, 64 and 128"),
    ("gemm", gemm_arguments, change("zeros", Tensor.int), r"zeros must be uint8, got int32"),
    ("gemm", gemm_arguments, change("zeros", lambda t: t[:, :64]), r"zeros must have the shape of scales, \[5, 72\], got \[5, 64\]"),
    ("gemm", gemm_arguments, change("zeros", transposed), r"zeros must be contiguous"),
    ("gemm", gemm_arguments, change("perm", Tensor.long), r"perm must be int32, got int64"),
    ("gemm", gemm_arguments, change("perm", lambda t: t[:100]), r"perm must have shape \[K\] = \[136\], got \[100\]"),
    ("gemm", gemm_arguments, change("perm", strided), r"perm must be contiguous"),
    ("gemm", gemm_arguments, change("bias", Tensor.float), r"bias must be float16, got float32"),
    ("gemm", gemm_arguments, change("bias", lambda t: t[:64]), r"bias must have shape \[N\] = \[72\], got \[64\]"),
    ("gemm", gemm_arguments, change("bias", lambda t: t[None]), r"bias must have shape"),
    ("gemm", gemm_arguments, change("bias", strided), r"bias must be contiguous"),
    ("dequantize", dequantize_arguments, change("qweight", Tensor.short), r"qweight must be int32, got int16"),
    ("dequantize", dequantize_arguments, change("scales", Tensor.float), r"scales must be float16 or bfloat16, got float32"),
    ("dequantize", dequantize_arguments, change("k", lambda _: 200), r"holds 3 blocks of 64 input features, but K = 200"),
    ("dequantize", dequantize_arguments, change("k", lambda _: -1), r"but K = -1"),
    ("dequantize", dequantize_arguments, change("zeros", lambda t: t[:2]), r"zeros must have the shape of scales"),
    ("dequantize", dequantize_arguments, change("perm", Tensor.float), r"perm must be int32, got float32"),
    ("pack", pack_arguments, change("q", Tensor.int), r"q must be uint8, got int32"),
    ("pack", pack_arguments, change("q", lambda t: t[0]), r"q must have shape \[N, K\], got \[136\]"),
    ("pack", pack_arguments, change("q", lambda t: t[:0]), r"q must not be empty, got \[0, 136\]"),
    ("pack", pack_arguments, change("q", transposed), r"q must be contiguous"),
    ("pack_24", pack_24_arguments, change("q", Tensor.int), r"q must be uint8, got int32"),
    ("pack_24", pack_24_arguments, change("q", lambda t: t[0]), r"q must have shape \[N, K\], got \[136\]"),
    ("pack_24", pack_24_arguments, change("q", lambda t: t[:0]), r"q must not be empty, got \[0, 136\]"),
    ("pack_24", pack_24_arguments, change("q", transposed), r"q must be contiguous"),
    ("pack_24", pack_24_arguments, change("q", lambda t: t[:, :130].contiguous()), r"K of q must be a multiple of 4, got 130"),
    ("pack_24", pack_24_arguments, change("mask", Tensor.byte), r"mask must be bool, got uint8"),
    ("pack_24", pack_24_arguments, change("mask", lambda t: t[:64]), r"mask must have the shape of q, \[72, 136\], got \[64, 136\]"),
    ("pack_24", pack_24_arguments, change("mask", transposed), r"mask must be contiguous"),
    ("pack_24", pack_24_arguments, change("q", lambda t: t[:, :0]), r"q must not be empty, got \[72, 0\]"),
    ("pack_24", pack_24_arguments, change("mask", lambda t: t[0]), r"mask must have the shape of q, \[72, 136\], got \[136\]"),
    ("unpack_24", unpack_24_arguments, change("qweight", strided), r"qweight must be contiguous"),
    ("unpack_24", unpack_24_arguments, change("k", lambda _: -4), r"k = -4 do not fit"),
    ("dequantize_24", dequantize_24_arguments, change("meta", Tensor.short), r"meta must be int32, got int16"),
    ("dequantize_24", dequantize_24_arguments, change("meta", strided), r"meta must be contiguous"),
    ("unpack_24", unpack_24_arguments, change("qweight", Tensor.long), r"qweight must be int32, got int64"),
    ("unpack_24", unpack_24_arguments, change("qweight", lambda t: t[0]), r"qweight must have shape \[ceil\(N/64\), ceil\(K/128\), 512\], got \[2, 512\]; make it with pack_24"),
    ("unpack_24", unpack_24_arguments, change("meta", Tensor.long), r"meta must be int32, got int64"),
    ("unpack_24", unpack_24_arguments, change("meta", lambda t: t[..., :128].contiguous()), r"meta must have shape \[2, 2, 256\], as qweight, got \[2, 2, 128\]; make both with pack_24"),
    ("unpack_24", unpack_24_arguments, change("meta", strided), r"meta must be contiguous"),
    ("unpack_24", unpack_24_arguments, change("k", lambda _: 134), r"k must be a multiple of 4, got 134"),
    ("unpack_24", unpack_24_arguments, change("k", lambda _: 300), r"n = 72, k = 300 do not fit qweight \[2, 2, 512\]"),
    ("unpack_24", unpack_24_arguments, change("n", lambda _: 0), r"n = 0"),
    ("dequantize_24", dequantize_24_arguments, change("meta", lambda t: t[:1]), r"meta must have shape \[2, 2, 256\], as qweight, got \[1, 2, 256\]"),
    ("dequantize_24", dequantize_24_arguments, change("scales", Tensor.float), r"scales must be float16 or bfloat16, got float32"),
    ("dequantize_24", dequantize_24_arguments, change("k", lambda _: 300), r"holds 2 blocks of 128 input features, but K = 300"),
    ("dequantize_24", dequantize_24_arguments, change("k", lambda _: 138), r"k must be a multiple of 4, got 138"),
    ("dequantize_24", dequantize_24_arguments, change("zeros", lambda t: t[:2]), r"zeros must have the shape of scales"),
    ("unpack", unpack_arguments, change("qweight", Tensor.float), r"qweight must be int32, got float32"),
    ("unpack", unpack_arguments, change("n", lambda _: 129), r"n = 129, k = 136 do not fit qweight \[2, 3, 512\]"),
    ("unpack", unpack_arguments, change("n", lambda _: 0), r"n = 0"),
    ("unpack", unpack_arguments, change("k", lambda _: 100), r"k = 100 do not fit"),
    ("unpack", unpack_arguments, change("k", lambda _: -5), r"k = -5 do not fit"),
    ("repack_gptq", gptq_arguments, change("qweight", Tensor.long), r"qweight must be int32, got int64"),
    ("repack_gptq", gptq_arguments, change("qweight", lambda t: t[0]), r"qweight must have shape \[K/8, N\], got \[72\]"),
    ("repack_gptq", gptq_arguments, change("qweight", lambda t: t[:0]), r"qweight must not be empty"),
    ("repack_gptq", gptq_arguments, change("qweight", transposed), r"qweight must be contiguous"),
    ("repack_gptq", gptq_arguments, change("perm", Tensor.long), r"perm must be int32, got int64"),
    ("repack_gptq", gptq_arguments, change("perm", lambda t: t[:8]), r"perm must have shape \[K\] = \[136\], got \[8\]"),
    ("repack_awq", awq_arguments, change("qweight", Tensor.byte), r"qweight must be int32, got uint8"),
    ("repack_awq", awq_arguments, change("qweight", lambda t: t[None]), r"qweight must have shape \[K, N/8\]"),
    ("repack_awq", awq_arguments, change("qweight", lambda t: t[:, :0]), r"qweight must not be empty"),
    ("repack_awq", awq_arguments, change("qweight", transposed), r"qweight must be contiguous"),
]  # fmt: skip

# Faults of values or addresses, which fake tensors do not have.
VALUE_CASES: list[tuple[str, Callable[[], dict[str, Any]], Change, str]] = [
    ("gemm", gemm_arguments, change("qweight", misaligned), r"qweight must start at a 16-byte boundary; call qweight\.clone"),
    ("gemm", gemm_arguments, change("perm", lambda t: t + 1), r"perm entry \d+ is 136; entries must be 0\.\.135"),
    ("gemm", gemm_arguments, change("perm", lambda t: t - 1), r"perm entry \d+ is -1; entries must be"),
    ("dequantize", dequantize_arguments, change("perm", lambda t: t * 1000), r"entries must be 0\.\.135"),
    ("pack", pack_arguments, change("q", lambda t: t + 16), r"q must hold 4-bit values, 0\.\.15, got 16"),
    ("pack_24", pack_24_arguments, change("q", lambda t: t + 16), r"q must hold 4-bit values, 0\.\.15, got 16"),
    ("unpack_24", unpack_24_arguments, change("qweight", misaligned), r"qweight must start at a 16-byte boundary"),
    ("repack_gptq", gptq_arguments, change("perm", lambda t: t.clamp(min=1)), r"perm holds 1 twice; it must be a permutation of 0\.\.135"),
    ("repack_gptq", gptq_arguments, change("perm", lambda t: t + 1), r"perm entry \d+ is 136"),
]  # fmt: skip


def message_of(op: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as info:
        getattr(ops, op)(**arguments)
    return str(info.value).splitlines()[0]


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[3][:40]}")
def test_wrong_argument(
    device: str, case: tuple[str, Callable[[], dict[str, Any]], Change, str]
) -> None:
    op, make, apply, pattern = case
    bad = apply(to_device(make(), device))
    message = message_of(op, bad)
    assert message.startswith(f"marlin::{op}: ")
    with pytest.raises(RuntimeError, match=pattern):
        getattr(ops, op)(**bad)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in bad.items()}
        assert message_of(op, fakes) == message


@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda c: f"{c[0]}-{c[3][:40]}")
def test_wrong_value(case: tuple[str, Callable[[], dict[str, Any]], Change, str]) -> None:
    op, make, apply, pattern = case
    with pytest.raises(RuntimeError, match=pattern):
        getattr(ops, op)(**apply(make()))


def test_good_arguments_pass(device: str) -> None:
    """The cases above differ from these by one thing each."""
    for op, make in {(c[0], c[1]) for c in CASES}:
        getattr(ops, op)(**to_device(make(), device))


def test_missing_and_unknown_arguments_are_named() -> None:
    with pytest.raises(RuntimeError, match="scales"):
        ops.gemm(torch.zeros(1, 64, dtype=torch.float16), torch.zeros(1, 1, 512).int())
    with pytest.raises(RuntimeError, match="workspace"):
        ops.gemm(**gemm_arguments(), workspace=None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["input", "scales", "zeros", "perm", "bias"])
def test_mixed_devices(name: str) -> None:
    arguments = to_device(gemm_arguments(), "cuda")
    arguments[name] = arguments[name].cpu()
    with pytest.raises(
        RuntimeError, match=f"{name} is on cpu but .* is on cuda:0; move them to one device"
    ):
        ops.gemm(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name"), [("pack_24", "mask"), ("unpack_24", "meta")])
def test_mixed_devices_24(op: str, name: str) -> None:
    make = pack_24_arguments if op == "pack_24" else unpack_24_arguments
    arguments = to_device(make(), "cuda")
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match=f"{name} is on cpu but .* is on cuda:0"):
        getattr(ops, op)(**arguments)


@pytest.mark.gpu
def test_indices_out_of_range_on_a_gpu_read_nothing() -> None:
    """They cannot be refused without waiting for the device, so the result says so instead."""
    arguments = to_device(gemm_arguments(), "cuda")
    arguments["perm"][3] = 10**6
    arguments["perm"][5] = -7
    assert bool(ops.gemm(**arguments).isnan().all())
    dense = ops.dequantize(**{k: arguments[k] for k in ("qweight", "scales", "zeros", "perm")}, k=K)
    assert int(dense.isnan().all(0).sum()) == 2  # the features that no column claims
    with pytest.raises(RuntimeError, match="q must hold 4-bit values"):
        ops.pack(torch.full((64, 64), 99, dtype=torch.uint8, device="cuda"))
