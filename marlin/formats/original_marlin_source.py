"""Checkpoints of the original Marlin kernel, as AutoGPTQ, GPTQModel and others saved them.

Their settings are those of GPTQ with ``is_marlin_format: true`` or ``checkpoint_format: "marlin"``,
or ``quant_method: "marlin"`` without the ``format_version`` that this package's own format has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from marlin.formats import original_marlin
from marlin.formats.source import SourceLayer
from marlin.formats.tiles_source import TilesFormat


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


class OriginalMarlinFormat(TilesFormat):
    name = "original-marlin"
    markers = ("B", "s")
    packing = "marlin"
    methods = ("marlin",)
    kernel = "the original Marlin kernel"
    layer_type = OriginalMarlinLayer

    @classmethod
    def is_named_by(cls, source: Mapping[str, Any]) -> bool:
        return (
            (source.get("quant_method") == "marlin" and "format_version" not in source)
            or cls.packing in (source.get("checkpoint_format"), source.get("format"))
            or source.get("is_marlin_format") is True
        )

    @staticmethod
    def sizes(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
        return original_marlin.check_layout(tensors["B"], tensors["s"], name)
