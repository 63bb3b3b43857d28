"""The parameters of packed layers in vLLM: each loads what its rank needs of a checkpoint's tensor.

vLLM fuses layers (q, k and v; gate and up) and shares their features out among tensor-parallel
ranks. Its parameter classes cut tensors at multiples of a packing factor; these cut packed ones
anywhere, as :mod:`marlin._part` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.parameter import (
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from marlin._linear_checks import check_dtypes_kept
from marlin._part import BLOCK, Part
from marlin.formats.native import PackedShape
from marlin.formats.packed import SYMMETRIC_ZERO, group_count, operands
from marlin.formats.sparse import FIRST_PLACES

logger = init_logger(__name__)


@dataclass
class Fusion:
    """A rank's part of some layers of a checkpoint that vLLM multiplies as one.

    Attributes:
        name: vLLM's, for messages.
        modules: the layers of the checkpoint, or the one that is stored fused.
        sizes: output features of each fused layer that the rank has.
        columns: input features that it has.
        dtype: of activations and scales.
        loaded: what has been loaded, as (leaf, index of the fused layer).
    """

    name: str
    modules: dict[str, PackedShape]
    sizes: list[int]
    columns: range
    dtype: torch.dtype
    loaded: set[tuple[str, int]] = field(default_factory=set)

    @property
    def shape(self) -> PackedShape:
        """That of any of the layers; they differ in their output features only."""
        return next(iter(self.modules.values()))

    @cached_property
    def part(self) -> Part:
        """The rank's columns, with rows that are of no meaning."""
        return Part(self.shape, range(1), self.columns)

    @property
    def blocks(self) -> list[int]:
        """Blocks of output features of each fused layer, as loaded: apart from each other."""
        return [-(-size // BLOCK) for size in self.sizes]

    def empty(self, leaf: str) -> Tensor:
        """A tensor to load into, of a layer that is all zeros."""
        k = self.part.shape.in_features
        groups = group_count(k, self.part.group_size)
        rules = operands(k, sum(self.sizes), groups, self.dtype, sparse=self.shape.sparse)
        dtype, size = rules[leaf]
        if leaf in ("qweight", "places"):
            size = (sum(self.blocks), *size[1:])
        start = {"zeros": SYMMETRIC_ZERO, "places": FIRST_PLACES}.get(leaf, 0)
        return torch.full(size, start, dtype=dtype)

    def load(self, leaf: str, data: Tensor, loaded: Tensor, offset: int, rank: int) -> None:
        """Copy the part of ``rank`` of the fused layer at ``offset`` output features to ``data``.

        Raises:
            ValueError: the layer is smaller than vLLM's, or its scales do not fit the dtype.
        """
        index = [sum(self.sizes[:i]) for i in range(len(self.sizes))].index(offset)
        size = self.sizes[index]
        shapes = list(self.modules.values())
        whole = shapes[index] if len(shapes) > 1 else shapes[0]
        if len(shapes) == 1 < len(self.sizes):  # vLLM has cut one tensor into those of its layers
            features = loaded.size(1) if leaf in ("scales", "zeros") else BLOCK * loaded.size(0)
            whole = replace(whole, out_features=features)
        try:
            part = Part(whole, range(rank * size, (rank + 1) * size), self.columns)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        value = part.cut(leaf, loaded)
        if leaf == "scales" and value.dtype != data.dtype:
            self._check_cast(value, data.dtype)
        if leaf in ("qweight", "places"):
            block = sum(self.blocks[:index])
            data[block : block + value.size(0)].copy_(value)
        else:
            data[:, offset : offset + size].copy_(value)
        self.loaded.add((leaf, index))

    def _check_cast(self, scales: Tensor, dtype: torch.dtype) -> None:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        check_dtypes_kept(self.name, cast, {"scales": scales, "bias": None})
        if not torch.equal(cast(scales).float(), scales.float()):
            logger.warning_once(
                "marlin: scales are %s in the checkpoint and are rounded to %s, the model's dtype; "
                "pass dtype=%s to keep them",
                scales.dtype,
                dtype,
                str(scales.dtype).removeprefix("torch."),
            )

    def check_complete(self, leaves: dict[str, list[bool]]) -> None:
        """Check that all or (a dummy model) nothing has been loaded of what the files have."""
        wanted = {(leaf, i) for leaf, there in leaves.items() for i, has in enumerate(there) if has}
        missing = sorted(wanted - self.loaded)
        if self.loaded and missing:
            names = ", ".join(sorted({leaf for leaf, _ in missing}))
            raise ValueError(
                f"{self.name}: vLLM has loaded a part of this layer, without {names}; the model's "
                "code does not load them under the names of the checkpoint"
            )


class _LoadsParts:
    """The loading of a parameter, in the words of vLLM's ``BasevLLMParameter``."""

    data: Tensor
    tp_rank: int
    fusion: Fusion
    leaf: str

    def _load(self, loaded: Tensor, offset: int, rank: int) -> None:
        self.fusion.load(self.leaf, self.data, loaded, offset, rank)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight, 0, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight, 0, 0)

    def load_merged_column_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        self._load(loaded_weight, place["shard_offset"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        # num_heads: how many ranks have the same heads of k and v.
        rank = self.tp_rank if place["shard_id"] == "q" else self.tp_rank // place["num_heads"]
        self._load(loaded_weight, place["shard_offset"], rank)


class BlocksParameter(_LoadsParts, PackedvLLMParameter):  # type: ignore[misc]
    """``qweight`` or ``places``, ``[blocks of output features, blocks of input features, ...]``."""


class GroupsParameter(_LoadsParts, GroupQuantScaleParameter):  # type: ignore[misc]
    """``scales`` or ``zeros``, ``[groups, output features]``."""


class OrderParameter(RowvLLMParameter):  # type: ignore[misc]
    """``perm``, or the part of it that belongs to the rank's columns: one for all fused layers."""

    fusion: Fusion
    leaf = "perm"

    def load(self, param: Any, loaded: Tensor, shard: Any = None) -> None:
        """A ``weight_loader``; whose part of a fused layer it is does not matter."""
        columns = self.fusion.columns
        own = loaded[columns.start : columns.stop].to(self.data.device)
        first = not any(leaf == "perm" for leaf, _ in self.fusion.loaded)
        if not first and not torch.equal(self.data, own):
            raise ValueError(
                f"{self.fusion.name}: {', '.join(self.fusion.modules)} have different act-orders, "
                "and vLLM multiplies them as one; quantise the model with desc_act=False"
            )
        self.data.copy_(own)
        self.fusion.loaded.update(("perm", i) for i in range(len(self.fusion.sizes)))


def make_parameter(leaf: str, fusion: Fusion, loader: Any) -> Any:
    """The parameter ``leaf`` of a layer; ``loader`` is the layer's, which calls its methods."""
    if leaf == "perm":
        order = torch.arange(fusion.columns.start, fusion.columns.stop, dtype=torch.int32)
        parameter = OrderParameter(data=order, input_dim=0, weight_loader=loader)
        parameter.weight_loader = parameter.load
    elif leaf in ("qweight", "places"):
        parameter = BlocksParameter(
            data=fusion.empty(leaf),
            input_dim=1,
            output_dim=0,
            packed_dim=0,
            packed_factor=BLOCK,
            weight_loader=loader,
        )
    else:
        parameter = GroupsParameter(
            data=fusion.empty(leaf), input_dim=0, output_dim=1, weight_loader=loader
        )
    parameter.fusion, parameter.leaf = fusion, leaf
    return parameter


def without_gaps(leaf: str, blocks: Tensor, fusion: Fusion) -> Tensor:
    """``qweight`` or ``places`` with the fused layers one after the other, as a kernel takes them.

    They are loaded into whole blocks, which those of all but the last may not fill.
    """
    if all(size % BLOCK == 0 for size in fusion.sizes[:-1]):
        return blocks
    k = fusion.part.shape.in_features
    starts = [BLOCK * sum(fusion.blocks[:i]) for i in range(len(fusion.sizes))]
    rows = torch.cat(
        [torch.arange(s, s + n) for s, n in zip(starts, fusion.sizes, strict=True)]
    ).to(blocks.device)
    n = BLOCK * blocks.size(0)
    if leaf == "places":
        codes = blocks.new_zeros((*blocks.shape[:2], 512))
        mask = torch.ops.marlin.unpack_24(codes, blocks, n, k)[1][rows]
        places: Tensor = torch.ops.marlin.pack_24(torch.zeros_like(mask, dtype=torch.uint8), mask)[
            1
        ]
        return places
    stored = k // 2 if fusion.shape.sparse else k
    qweight: Tensor = torch.ops.marlin.pack(torch.ops.marlin.unpack(blocks, n, stored)[rows])
    return qweight
