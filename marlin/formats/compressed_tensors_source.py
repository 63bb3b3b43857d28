"""compressed-tensors checkpoints as a source of layers, dense and 2:4 sparse."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from marlin.formats import compressed_tensors, marlin_24
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.compressed_tensors_config import (
    PACKED,
    SPARSE,
    CompressedTensorsConfig,
    WeightGroup,
    parse_compressed_tensors_config,
)
from marlin.formats.marlin_24_source import Marlin24Layer
from marlin.formats.packed import bias_problems
from marlin.formats.source import SourceFormat, SourceLayer, missing_leaves

REQUIRED: dict[str, tuple[str, ...]] = {
    PACKED: ("weight_packed", "weight_scale", "weight_shape"),
    SPARSE: marlin_24.COMPRESSED_TENSORS,
}
OPTIONAL = {PACKED: ("weight_zero_point", "weight_g_idx", "bias"), SPARSE: ("bias",)}


class PackQuantizedLayer(SourceLayer):
    """Its tensors have passed :func:`marlin.formats.compressed_tensors.check_layout`."""

    scale_leaf = "weight_scale"

    def codes(self) -> Tensor:
        return compressed_tensors.unpack_nibbles(self.read("weight_packed"), self.in_features)

    def scales(self) -> Tensor:
        return self.read("weight_scale").T

    def zeros(self) -> Tensor | None:
        if not self.has("weight_zero_point"):
            return None
        return compressed_tensors.read_zeros(
            self.read("weight_zero_point"), self.out_features, self.groups, self.name
        )

    def group_of_feature(self) -> Tensor:
        in_order = super().group_of_feature()
        if not self.has("weight_g_idx"):
            return in_order
        g_idx = self.read("weight_g_idx").long()
        return in_order if bool((g_idx == -1).all()) else g_idx

    def order(self) -> Tensor | None:
        if not self.has("weight_g_idx"):
            return None
        g_idx = self.read("weight_g_idx")
        return compressed_tensors.read_order(g_idx, self.in_features, self.group_size, self.name)

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, None]:
        weight = self.read("weight_packed")
        return compressed_tensors.pack_codes(weight, self.in_features, perm), None


class InOrderLayer(PackQuantizedLayer):
    """One whose group in the config has no act-order."""

    def order(self) -> Tensor | None:
        if super().order() is not None:
            raise CheckpointError(
                f"{self.name}: weight_g_idx: got features out of the order of their groups; only "
                "with actorder 'group' in the config may they be; correct the config, or fetch the "
                "checkpoint again"
            )
        return None


class CompressedTensorsFormat(SourceFormat):
    name = "compressed-tensors"
    markers = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "scale_packed",
    )
    scale_leaves = ("weight_scale", "scale_packed")

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings = checkpoint.config["quantization_config"]
        self._config: CompressedTensorsConfig = parse_compressed_tensors_config(settings)

    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> SourceLayer:
        group = self._group(name, leaves)
        required = REQUIRED[group.format]
        if group.format == PACKED and not group.symmetric:
            required += ("weight_zero_point",)
        if group.stores_order:
            required += ("weight_g_idx",)
        allowed = dict.fromkeys((*required, *OPTIONAL[group.format]))
        problems = self.stray_leaves(name, leaves, allowed) + missing_leaves(name, leaves, required)
        if problems:
            raise CheckpointError(
                [
                    f"{text} (format {group.format} of config_groups.{group.name})"
                    for text in problems
                ]
            )
        make = _marlin_24_layer if group.format == SPARSE else _pack_quantized_layer
        layer = make(checkpoint, name, group)
        if "bias" in leaves:
            bias = checkpoint.outline(f"{name}.bias")
            problems += bias_problems(bias, layer.out_features, name)
        groups = checkpoint.tensors[f"{name}.{layer.scale_leaf}"].shape[0 if layer.sparse else 1]
        if groups != layer.groups:
            problems.append(
                f"{name}: {layer.scale_leaf}: got {groups} groups for in_features="
                f"{layer.in_features}; with {_size(group)} of config_groups.{group.name} there "
                f"must be {layer.groups}; correct the config, or fetch the checkpoint again"
            )
        if problems:
            raise CheckpointError(problems)
        return layer

    def _group(self, name: str, leaves: Collection[str]) -> WeightGroup:
        group = self._config.group_of(name)
        if group is not None:
            return group
        reason = (
            "the config's ignore names it"
            if self._config.ignores(name)
            else "no target of the config's config_groups matches it"
        )
        raise CheckpointError(
            f"{name}: {reason}, but it has {', '.join(leaves)}; correct the config, or fetch the "
            "checkpoint again"
        )


def _size(group: WeightGroup) -> str:
    return "strategy channel" if group.group_size == -1 else f"group_size {group.group_size}"


def _pack_quantized_layer(checkpoint: Checkpoint, name: str, group: WeightGroup) -> SourceLayer:
    n, k = compressed_tensors.read_shape(checkpoint.read(f"{name}.weight_shape"), name)
    packed, scale = (
        checkpoint.outline(f"{name}.{leaf}") for leaf in ("weight_packed", "weight_scale")
    )
    compressed_tensors.check_layout(packed, scale, n, k, name)
    kind = PackQuantizedLayer if group.stores_order else InOrderLayer
    layer = kind(checkpoint, name, k, n, group.group_size)
    layer.symmetric_setting = "symmetric: true" if group.symmetric else ""
    return layer


def _marlin_24_layer(checkpoint: Checkpoint, name: str, group: WeightGroup) -> SourceLayer:
    packed, scale, meta = (checkpoint.outline(f"{name}.{leaf}") for leaf in REQUIRED[SPARSE])
    n, k = marlin_24.check_layout(packed, scale, meta, name)
    return Marlin24Layer(checkpoint, name, k, n, group.group_size)
