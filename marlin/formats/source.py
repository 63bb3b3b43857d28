"""What a checkpoint format offers to the converter: its quantized layers, read part by part.

A format is one subclass of :class:`SourceFormat`, made from a checkpoint's configuration by
:func:`marlin.formats.detect.source_format`, and a subclass of :class:`SourceLayer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.packed import (
    SYMMETRIC_ZERO,
    PackedWeight,
    Parameters,
    cast_bias,
    cast_exactly,
    group_count,
)


class SourceLayer(ABC):
    """One quantized layer: its sizes are known, its values are read when they are asked for.

    ``sparse``: its weight is stored 2:4 sparse. ``scale_leaf``: the tensor of its scales.
    ``symmetric_setting``: the setting by which all its zero points are 8, or nothing.
    """

    sparse: ClassVar[bool] = False
    scale_leaf: ClassVar[str]
    symmetric_setting: str = ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        in_features: int,
        out_features: int,
        group_size: int,
    ) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size

    @property
    def groups(self) -> int:
        return group_count(self.in_features, self.group_size)

    @abstractmethod
    def codes(self) -> Tensor:
        """The integers, uint8 ``[N, K]``, in the order of the input features."""

    @abstractmethod
    def scales(self) -> Tensor:
        """``[G, N]`` in the dtype in which they are stored."""

    @abstractmethod
    def zeros(self) -> Tensor | None:
        """True zero points 0..15, uint8 ``[G, N]``; None: none are stored, 8 everywhere."""

    @abstractmethod
    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``PackedWeight.qweight``, the input features in the order ``perm``, and ``places``."""

    def group_of_feature(self) -> Tensor:
        """The group of each input feature, int64 ``[K]``."""
        features = torch.arange(self.in_features)
        return features // self.group_size if self.groups > 1 else torch.zeros_like(features)

    def order(self) -> Tensor | None:
        """``Parameters.perm``."""
        return None

    def weight_problems(self) -> list[str]:
        """What is wrong with the stored weight: nothing where every word is valid."""
        return []

    def bias(self) -> Tensor | None:
        return self.read("bias") if self.has("bias") else None

    def has(self, leaf: str) -> bool:
        return f"{self.name}.{leaf}" in self.checkpoint.tensors

    def read(self, leaf: str) -> Tensor:
        return self.checkpoint.read(f"{self.name}.{leaf}")

    def parameters(self, dtype: torch.dtype | None) -> Parameters:
        """All but the weight, checked; ``dtype`` as in :func:`marlin.convert.convert`.

        Raises :class:`CheckpointError` listing all that is wrong.
        """
        problems = self.weight_problems()
        perm = zeros = bias = None
        scales = torch.empty(0)
        with collected(problems):
            perm = self.order()
        with collected(problems):
            zeros = self._checked_zeros()
        with collected(problems):
            scales = cast_exactly(self.scales(), dtype, self.name, self.scale_leaf)
            bias = cast_bias(self.bias(), scales.dtype, dtype, self.name)
        if problems:
            raise CheckpointError(problems)
        return Parameters(scales, zeros, perm, bias)

    def _checked_zeros(self) -> Tensor | None:
        zeros = self.zeros()
        if zeros is None:
            return None
        off = (zeros != SYMMETRIC_ZERO).nonzero()
        if len(off) == 0:
            return None
        if self.symmetric_setting:
            group, column = (int(i) for i in off[0])
            raise CheckpointError(
                f"{self.name}: zero points: got {int(zeros[group, column])} in group {group}, "
                f"column {column}; with {self.symmetric_setting} in the config each must be 8; if "
                "the layer is asymmetric, correct the config"
            )
        return zeros

    def warning(self, rest: Parameters) -> str:
        """What the user should know about the layer, or nothing."""
        return ""

    def pack(self, rest: Parameters) -> PackedWeight:
        """The layer in the packed layout; ``rest`` is what :meth:`parameters` returned."""
        qweight, places = self.packed_weight(rest.perm)
        sizes = self.in_features, self.out_features
        return PackedWeight(qweight, rest.scales, rest.zeros, rest.perm, *sizes, rest.bias, places)


class SourceFormat(ABC):
    """A format, with the settings of one checkpoint.

    ``markers``: leaf names of tensors that only a quantized layer has. ``scale_leaves``: those of
    scales.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    scale_leaves: ClassVar[tuple[str, ...]] = ("scales",)

    @abstractmethod
    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> SourceLayer:
        """The layer ``name``, which has tensors called ``leaves``; only headers are read.

        Raises :class:`CheckpointError` with all that is wrong with its settings and with the names,
        dtypes and shapes of its tensors.
        """

    def checkpoint_problem(self, found: Iterable[tuple[SourceLayer, int | None]]) -> str:
        """What is wrong with the layers as a whole, or nothing.

        They come with the one value that all zero points of a layer have, or None.
        """
        return ""

    def stray_leaves(
        self, name: str, leaves: Collection[str], allowed: Collection[str]
    ) -> list[str]:
        """A refusal of each tensor that the converter would have to leave out."""
        present = ", ".join(marker for marker in self.markers if marker in leaves)
        return [
            f"{name}: {leaf} beside {present}: a quantized linear layer has only "
            f"{', '.join(allowed)}"
            for leaf in leaves
            if leaf not in allowed
        ]


def missing_leaves(name: str, leaves: Collection[str], required: Iterable[str]) -> list[str]:
    """A refusal for each tensor that a layer lacks."""
    return [f"{name}: {leaf} is missing" for leaf in required if leaf not in leaves]


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the refusals raised inside to ``problems`` and go on behind the block."""
    try:
        yield
    except CheckpointError as error:
        problems += error.refusals
