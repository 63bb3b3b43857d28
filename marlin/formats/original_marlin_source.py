"""Checkpoints of the original Marlin kernel, as AutoGPTQ, GPTQModel and others saved them.

Their settings are those of GPTQ with ``is_marlin_format: true`` or ``checkpoint_format: "marlin"``,
or ``quant_method: "marlin"`` without the ``format_version`` that this package's own format has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from marlin.formats import original_marlin
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.gptq_config import merged_settings
from marlin.formats.packed import bias_problems
from marlin.formats.source import SourceFormat, SourceLayer, missing_leaves
from marlin.formats.tiles import GROUP

REQUIRED = ("B", "s")
LEAVES = (*REQUIRED, "bias")


class OriginalMarlinLayer(SourceLayer):
    """Its tensors have passed :func:`marlin.formats.original_marlin.check_layout`."""

    scale_leaf = "s"

    def codes(self) -> Tensor:
        return original_marlin.unpack_weight(self.read("B"))

    def scales(self) -> Tensor:
        return original_marlin.order_scales(self.read("s"))

    def zeros(self) -> None:
        return None

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, None]:
        return torch.ops.marlin.pack(self.codes()), None


class OriginalMarlinFormat(SourceFormat):
    name = "original-marlin"
    markers = ("B", "s")
    scale_leaves = ("s",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._group_size = _group_size(checkpoint)

    def layer(
        self, checkpoint: Checkpoint, name: str, leaves: Collection[str]
    ) -> OriginalMarlinLayer:
        problems = self.stray_leaves(name, leaves, LEAVES) + missing_leaves(name, leaves, REQUIRED)
        if problems:
            raise CheckpointError(problems)
        words, scales = (checkpoint.outline(f"{name}.{leaf}") for leaf in REQUIRED)
        n, k = original_marlin.check_layout(words, scales, name)
        layer = OriginalMarlinLayer(checkpoint, name, k, n, self._group_size)
        if "bias" in leaves:
            problems += bias_problems(checkpoint.outline(f"{name}.bias"), n, name)
        if scales.size(0) != layer.groups:
            problems.append(
                f"{name}: s: got {scales.size(0)} groups for in_features={k}; with group_size "
                f"{self._group_size} in the config there must be {layer.groups}; correct "
                "group_size, or fetch the checkpoint again"
            )
        if problems:
            raise CheckpointError(problems)
        return layer


def says_original_marlin(checkpoint: Checkpoint) -> bool:
    """Whether one of the places for settings names the original Marlin kernel's packing."""
    return any(
        isinstance(source, Mapping) and _names_it(source)
        for source in (checkpoint.config.get("quantization_config"), checkpoint.quantize_config)
    )


def _names_it(source: Mapping[str, Any]) -> bool:
    return (
        (source.get("quant_method") == "marlin" and "format_version" not in source)
        or "marlin" in (source.get("checkpoint_format"), source.get("format"))
        or source.get("is_marlin_format") is True
    )


def _group_size(checkpoint: Checkpoint) -> int:
    """The group size; raises :class:`CheckpointError` with all settings that cannot be read."""
    values, where, problems = merged_settings(checkpoint.config, checkpoint.quantize_config)
    allowed: dict[str, tuple[tuple[object, ...], str]] = {
        "quant_method": (("gptq", "marlin"), "which is of 'gptq' or 'marlin'"),
        "checkpoint_format": (("marlin",), "which the config names elsewhere"),
        "is_marlin_format": ((True, False), "which is named by checkpoint_format, too"),
        "bits": ((4,), "which holds 4-bit weights only"),
        "group_size": ((-1, GROUP), f"which has groups of {GROUP}, or one (-1)"),
        "sym": ((True,), "which stores no zero points"),
        "desc_act": ((False,), "which stores no order of the features"),
        "pack_dtype": (("int32", "torch.int32"), "which is of 32-bit words"),
    }
    for key, (choices, reason) in allowed.items():
        value = values.get(key, None if key == "group_size" else choices[0])
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            problems.append(
                f"{where}: {key}: got {value!r} with the packing of the original Marlin kernel, "
                f"{reason}; correct the config, or fetch the checkpoint again"
            )
    dynamic = values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not key.startswith("-:") for key in dynamic):
        problems.append(
            f"{where}: dynamic: got {dynamic!r} with the packing of the original Marlin kernel, "
            "for which only exclusions ('-:...') are read; quantize the model again without it"
        )
    if problems:
        raise CheckpointError(problems)
    size: int = values["group_size"]
    return size
