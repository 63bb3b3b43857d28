"""The checkpoints that ``marlin convert`` writes, as a source of layers: for export and verify."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.native import (
    LEAVES,
    PackedShape,
    check_packed_tensors,
    check_values,
    packed_modules,
)
from marlin.formats.source import SourceFormat, SourceLayer, collected
from marlin.formats.sparse import zero_codes


class NativeLayer(SourceLayer):
    """A layer whose tensors have passed :func:`marlin.formats.native.check_packed_tensors`."""

    scale_leaf = "scales"

    def codes(self) -> Tensor:
        packed = self.unpacked()
        if not self.has("perm"):
            return packed
        codes = torch.empty_like(packed)
        codes[:, self.read("perm").long()] = packed
        return codes

    def unpacked(self) -> Tensor:
        """The integers in the order in which they are packed, uint8 ``[N, K]``."""
        found: Tensor = torch.ops.marlin.unpack(
            self.read("qweight"), self.out_features, self.in_features
        )
        return found

    def scales(self) -> Tensor:
        return self.read("scales")

    def zeros(self) -> Tensor | None:
        return self.read("zeros") if self.has("zeros") else None

    def group_of_feature(self) -> Tensor:
        in_order = super().group_of_feature()
        if not self.has("perm"):
            return in_order
        groups = torch.empty_like(in_order)
        groups[self.read("perm").long()] = in_order
        return groups

    def order(self) -> Tensor | None:
        return self.read("perm") if self.has("perm") else None

    def weight_problems(self) -> list[str]:
        problems: list[str] = []
        with collected(problems):
            leaves = [leaf for leaf in ("perm", "zeros", "places") if self.has(leaf)]
            check_values(self.name, {leaf: self.read(leaf) for leaf in leaves})
        return problems

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.read("qweight"), self.read("places") if self.sparse else None


class NativeSparseLayer(NativeLayer):
    """A 2:4 sparse one: a weight that is not stored has the code of its zero point."""

    sparse = True

    def unpacked(self) -> Tensor:
        codes, stored = torch.ops.marlin.unpack_24(
            self.read("qweight"), self.read("places"), self.out_features, self.in_features
        )
        return torch.where(stored, codes, zero_codes(self.zeros(), self.in_features))


class NativeFormat(SourceFormat):
    name = "marlin"
    markers = ("qweight",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._modules: dict[str, PackedShape] = packed_modules(checkpoint.config)
        check_packed_tensors(checkpoint, self._modules)

    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> NativeLayer:
        shape = self._modules[name]
        stray = self.stray_leaves(name, leaves, LEAVES)
        if stray:
            raise CheckpointError(stray)
        make = NativeSparseLayer if shape.sparse else NativeLayer
        return make(checkpoint, name, shape.in_features, shape.out_features, shape.group_size)
