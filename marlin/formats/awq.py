"""AWQ layers ("gemm" version) as tensors, and the settings of their checkpoints.

Shapes: K input features, N output features, G groups. ``qweight`` int32 ``[K, N/8]``: nibble i of
word (k, c) is the weight of output ``8c + ORDER[i]``. ``qzeros`` int32 ``[G, N/8]`` holds true zero
points in the same order (not minus one, as GPTQ's). ``scales`` ``[G, N]``. A weight is
``(q - zero) * scale``. The order is that of AutoAWQ (awq/modules/linear/gemm.py, WQLinear_GEMM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.packed import (
    GROUP_SIZES,
    SYMMETRIC_ZERO,
    PackedWeight,
    bias_problems,
    cast_exactly,
    describe,
    group_size_of,
    label,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column ORDER[i] of its eight
OTHER_VERSIONS = {
    "gemv": "packed along the input features, with padded zero points, for another kernel",
    "gemv_fast": "16-bit words, interleaved for another kernel",
    "gemvfast": "16-bit words, interleaved for another kernel",
    "marlin": "the packing of the original Marlin kernel",
    "llm-awq": "the packing of the original AWQ repository",
}


@dataclass(frozen=True)
class AwqConfig:
    """The settings of an AWQ checkpoint: group size (-1: one group), and whether zeros are stored.

    ``modules_to_not_convert``: modules whose name contains one of these strings were left.
    """

    group_size: int
    zero_point: bool
    modules_to_not_convert: tuple[str, ...]

    def excluding(self, module: str) -> str | None:
        """The entry of ``modules_to_not_convert`` that is a whole part of the name, or None.

        Tools differ on entries that are part of a word, as ``gate`` is of ``gate_proj``: the
        tensors say what became of such a module.
        """
        return next((e for e in self.modules_to_not_convert if f".{e}." in f".{module}."), None)


def parse_awq_config(config: Mapping[str, Any]) -> AwqConfig:
    """Read ``quantization_config`` of a ``config.json``, or an older ``quant_config.json``.

    Raises:
        CheckpointError: listing every setting that is missing, malformed or not supported.
    """
    problems: list[str] = []
    method = config.get("quant_method", "awq")
    if method != "awq":
        problems.append(f"quant_method: got {method!r}; this reader takes 'awq' only")
    for key in ("version", "checkpoint_format", "format"):  # the last two are GPTQModel's names
        version = config.get(key, "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            reason = OTHER_VERSIONS.get(str(version).lower(), "not known here")
            problems.append(
                f"{key}: got {version!r} ({reason}); only 'gemm' is read; quantise the model again "
                "with version='GEMM', or take such a copy of it"
            )
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        problems.append(
            f"pack_dtype: got {config['pack_dtype']!r}; only int32 words are read; quantise the "
            "model again with these"
        )
    if config.get("dynamic"):
        problems.append(
            "dynamic: got settings of single modules, which are read for GPTQ only; quantise the "
            "model again with one setting for all"
        )
    bits = config.get("bits", config.get("w_bit"))
    if type(bits) is not int or bits != 4:
        problems.append(f"bits: got {bits!r}; only 4-bit weights are read; take a 4-bit checkpoint")
    group_size = config.get("group_size", config.get("q_group_size"))
    if type(group_size) is not int or group_size not in (-1, *GROUP_SIZES):
        problems.append(
            f"group_size: got {group_size!r}; it must be -1, 32, 64 or 128; quantise the model "
            "again with one of these"
        )
        group_size = -1
    zero_point = config.get("zero_point", True)
    if not isinstance(zero_point, bool):
        problems.append(
            f"zero_point: got {zero_point!r}; it must be true or false; correct the file"
        )
        zero_point = True
    excluded = config.get("modules_to_not_convert") or ()
    listed = isinstance(excluded, Sequence) and not isinstance(excluded, str)
    if not listed or not all(isinstance(name, str) for name in excluded):
        problems.append(
            f"modules_to_not_convert: got {excluded!r}; it must list names; correct the file"
        )
        excluded = ()
    if problems:
        raise CheckpointError(problems, where="AWQ quantization_config")
    return AwqConfig(group_size, zero_point, tuple(excluded))


def read_awq_config(places: Mapping[str, Mapping[str, Any] | None]) -> AwqConfig:
    """The settings of a checkpoint that may have them in several files: file -> settings or None.

    Raises:
        CheckpointError: listing every setting that cannot be read or that differs between them.
    """
    found = {
        file: parse_awq_config(config) for file, config in places.items() if config is not None
    }
    (first, settings), *others = found.items()
    problems = [
        f"{first} and {file} disagree on {key}: {ours!r} and {theirs!r}; remove the file, or "
        "correct the one that is wrong"
        for file, other in others
        for key in ("group_size", "zero_point")
        if (ours := getattr(settings, key)) != (theirs := getattr(other, key))
    ]
    if problems:
        raise CheckpointError(problems)
    return settings


def unpack_weight(qweight: Tensor) -> Tensor:
    """AWQ ``qweight`` int32 ``[K, N/8]`` -> the integers, uint8 ``[N, K]``."""
    return unpack_zeros(qweight).T.contiguous()


def unpack_zeros(qzeros: Tensor) -> Tensor:
    """AWQ ``qzeros`` int32 ``[G, N/8]`` -> true zero points 0..15, uint8 ``[G, N]``."""
    groups, words = qzeros.shape
    zeros = torch.empty(groups, words, 8, dtype=torch.uint8, device=qzeros.device)
    for nibble, column in enumerate(ORDER):
        zeros[:, :, column] = ((qzeros >> (4 * nibble)) & 15).to(torch.uint8)
    return zeros.view(groups, 8 * words)


def pack_awq(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layer: str = "",
) -> PackedWeight:
    """Convert one AWQ layer exactly: no weight, scale or zero point changes its value.

    Args:
        qweight: int32 ``[K, N/8]``, on any device.
        qzeros: int32 ``[G, N/8]``, or None for symmetric weights (zero point 8).
        scales: fp16 or bf16 (or fp32, with ``dtype``) ``[G, N]``.
        dtype: of the packed scales; None keeps that of ``scales``.
        layer: name of the layer, for error messages.

    Returns:
        The packed layer; ``zeros`` is None where every zero point is 8, which is faster.

    Raises:
        CheckpointError: listing every shape or dtype that does not fit, or a scale that is not
            finite.
    """
    groups = check_layout(qweight, qzeros, scales, layer)
    in_features, out_features = qweight.size(0), 8 * qweight.size(1)
    group_size_of(in_features, groups, layer)
    kept = cast_exactly(scales, dtype, layer, "scales")
    zeros = None if qzeros is None else unpack_zeros(qzeros)
    if zeros is not None and bool((zeros == SYMMETRIC_ZERO).all()):
        zeros = None
    packed: Tensor = torch.ops.marlin.repack_awq(qweight.contiguous())
    return PackedWeight(packed, kept, zeros, None, in_features, out_features)


def check_layout(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    layer: str,
    bias: Tensor | None = None,
) -> int:
    """The number of groups, once every shape and dtype fits the others; values are not read."""
    prefix = label(layer)
    problems = []
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.numel() == 0:
        problems.append(
            f"{prefix}qweight: got {describe(qweight)}; it must be int32 [in_features, "
            "out_features / 8]; is this an AWQ 'gemm' layer?"
        )
    if scales.dim() != 2 or not scales.is_floating_point() or scales.numel() == 0:
        problems.append(
            f"{prefix}scales: got {describe(scales)}; it must be float16 or bfloat16 [groups, "
            "out_features]; is this an AWQ 'gemm' layer?"
        )
    if problems:
        raise CheckpointError(problems)
    groups, words = scales.size(0), qweight.size(1)
    if scales.size(1) != 8 * words:
        problems.append(
            f"{prefix}scales: got {describe(scales)}; qweight {describe(qweight)} has {8 * words} "
            f"output features, so it must be [groups, {8 * words}]; the tensors are not of one "
            "layer, or of a GPTQ layer (use from_gptq)"
        )
    if qzeros is not None and (qzeros.dtype != torch.int32 or qzeros.shape != (groups, words)):
        problems.append(
            f"{prefix}qzeros: got {describe(qzeros)}; it must be int32 [{groups}, {words}], a row "
            "per group and a word per 8 output features; pass None for symmetric weights"
        )
    problems += bias_problems(bias, 8 * words, layer)
    others = {"scales": scales} | ({} if qzeros is None else {"qzeros": qzeros})
    problems += [
        f"{prefix}{name}: got a tensor on {tensor.device}; qweight is on {qweight.device} and all "
        f"must be on one device; move it with {name}.to({str(qweight.device)!r})"
        for name, tensor in others.items()
        if tensor.device != qweight.device
    ]
    if problems:
        raise CheckpointError(problems)
    return groups
