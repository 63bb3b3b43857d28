"""AWQ checkpoints as a source of layers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from marlin.formats.awq import check_layout, read_awq_config, unpack_weight, unpack_zeros
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.packed import group_count
from marlin.formats.source import SourceFormat, SourceLayer, missing_leaves

REQUIRED = ("qweight", "qzeros", "scales")
LEAVES = (*REQUIRED, "bias")


class AwqLayer(SourceLayer):
    """A layer whose tensors have passed :func:`marlin.formats.awq.check_layout`."""

    scale_leaf = "scales"

    def codes(self) -> Tensor:
        return unpack_weight(self.read("qweight"))

    def scales(self) -> Tensor:
        return self.read("scales")

    def zeros(self) -> Tensor | None:
        return unpack_zeros(self.read("qzeros")) if self.has("qzeros") else None

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, None]:
        return torch.ops.marlin.repack_awq(self.read("qweight")), None


class AwqFormat(SourceFormat):
    name = "awq"
    markers = ("qweight", "qzeros")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = read_awq_config(
            {
                "config.json": checkpoint.config.get("quantization_config"),
                "quantize_config.json": checkpoint.quantize_config,
                "quant_config.json": checkpoint.quant_config,
            }
        )

    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> AwqLayer:
        problems = self.stray_leaves(name, leaves, LEAVES)
        excluding = self._config.excluding(name)
        if excluding is not None:
            problems.append(
                f"{name}: modules_to_not_convert has {excluding!r}, but the layer has "
                f"{', '.join(leaves)}; correct the config, or fetch the checkpoint again"
            )
        required = REQUIRED if self._config.zero_point else ("qweight", "scales")
        problems += missing_leaves(name, leaves, required)
        if problems:
            raise CheckpointError(problems)
        qweight, scales = (checkpoint.outline(f"{name}.{leaf}") for leaf in ("qweight", "scales"))
        qzeros = checkpoint.outline(f"{name}.qzeros") if "qzeros" in leaves else None
        bias = checkpoint.outline(f"{name}.bias") if "bias" in leaves else None
        groups = check_layout(qweight, qzeros, scales, name, bias)
        k, n, size = qweight.size(0), 8 * qweight.size(1), self._config.group_size
        if groups != group_count(k, size):
            raise CheckpointError(
                f"{name}: scales: got {groups} groups for in_features={k}; with group_size {size} "
                f"in the config there must be {group_count(k, size)}; correct group_size, or fetch "
                "the checkpoint again"
            )
        layer = AwqLayer(checkpoint, name, k, n, size)
        layer.symmetric_setting = "" if self._config.zero_point else "zero_point: false"
        return layer
