"""Checkpoints of the original Marlin kernel and of Sparse-Marlin: what their settings share.

These are the settings of GPTQ with another ``checkpoint_format``, or with a ``quant_method`` of
their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.gptq_config import merged_settings
from marlin.formats.packed import bias_problems
from marlin.formats.source import SourceFormat, SourceLayer, missing_leaves
from marlin.formats.tiles import GROUP


class TilesFormat(SourceFormat):
    """A format whose tensors are in a packing of :mod:`marlin.formats.tiles`.

    ``markers`` are the tensors that every layer has, the scales ``s`` among them. ``packing`` is
    the ``checkpoint_format`` that names it, ``methods`` are the values of ``quant_method`` beside
    ``"gptq"``, and ``kernel`` is what messages call it.
    """

    packing: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    kernel: ClassVar[str]
    layer_type: ClassVar[type[SourceLayer]]
    scale_leaves = ("s",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._group_size = self._read_group_size(checkpoint)

    @classmethod
    def is_named_in(cls, checkpoint: Checkpoint) -> bool:
        """Whether one of the places for settings names this packing."""
        return any(
            isinstance(source, Mapping) and cls.is_named_by(source)
            for source in (checkpoint.config.get("quantization_config"), checkpoint.quantize_config)
        )

    @classmethod
    @abstractmethod
    def is_named_by(cls, source: Mapping[str, Any]) -> bool:
        """Whether these settings name this packing."""

    @staticmethod
    @abstractmethod
    def sizes(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
        """N and K of the layer ``name``, of which these meta tensors are ``markers``.

        Raises :class:`CheckpointError` when they do not fit one another.
        """

    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> SourceLayer:
        problems = self.stray_leaves(name, leaves, (*self.markers, "bias"))
        problems += missing_leaves(name, leaves, self.markers)
        if problems:
            raise CheckpointError(problems)
        tensors = {leaf: checkpoint.outline(f"{name}.{leaf}") for leaf in leaves}
        n, k = self.sizes(tensors, name)
        layer = self.layer_type(checkpoint, name, k, n, self._group_size)
        problems += bias_problems(tensors.get("bias"), n, name)
        groups = tensors["s"].size(0)
        if groups != layer.groups:
            problems.append(
                f"{name}: s: got {groups} groups for in_features={k}; with group_size "
                f"{self._group_size} in the config there must be {layer.groups}; correct "
                "group_size, or fetch the checkpoint again"
            )
        if problems:
            raise CheckpointError(problems)
        return layer

    def _read_group_size(self, checkpoint: Checkpoint) -> int:
        """The group size; raises :class:`CheckpointError` with all settings that are not read."""
        values, where, problems = merged_settings(checkpoint.config, checkpoint.quantize_config)
        methods = ("gptq", *self.methods)
        allowed: dict[str, tuple[tuple[object, ...], str]] = {
            "quant_method": (methods, f"which is of {' or '.join(map(repr, methods))}"),
            "checkpoint_format": ((self.packing,), "which the config names elsewhere"),
            "is_marlin_format": ((True, False), "which is named by checkpoint_format, too"),
            "bits": ((4,), "of which 4-bit weights only are read"),
            "group_size": ((-1, GROUP), f"which has groups of {GROUP}, or one (-1)"),
            "sym": ((True,), "which stores no zero points"),
            "desc_act": ((False,), "which stores no order of the features"),
            "pack_dtype": (("int32", "torch.int32"), "which is of 32-bit words"),
        }
        for key, (choices, reason) in allowed.items():
            value = values.get(key, None if key == "group_size" else choices[0])
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                problems.append(
                    f"{where}: {key}: got {value!r} with the packing of {self.kernel}, {reason}; "
                    "correct the config, or fetch the checkpoint again"
                )
        dynamic = values.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or any(not key.startswith("-:") for key in dynamic):
            problems.append(
                f"{where}: dynamic: got {dynamic!r} with the packing of {self.kernel}, for which "
                "only exclusions ('-:...') are read; quantize the model again without it"
            )
        if problems:
            raise CheckpointError(problems)
        size: int = values["group_size"]
        return size
