"""2:4 sparse layers in Marlin's packing, and the checkpoints of Sparse-Marlin that are of them.

The settings of these are those of GPTQ with ``checkpoint_format: "marlin_24"``, or
``quant_method: "gptq_marlin_24"``. Source: vLLM, gptq_marlin_24.py, which read them, as did
text-generation-inference. In ``marlin-24`` checkpoints of compressed-tensors the same layers have
other names: see :mod:`marlin.formats.compressed_tensors_source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from marlin.formats import marlin_24
from marlin.formats.marlin_24 import COMPRESSED_TENSORS, SPARSE_MARLIN, Names
from marlin.formats.source import SourceLayer, collected
from marlin.formats.sparse import pack_used
from marlin.formats.tiles_source import TilesFormat


class Marlin24Layer(SourceLayer):
    """Its tensors, called ``names``, have passed :func:`marlin.formats.marlin_24.check_layout`."""

    sparse = True
    names: ClassVar[Names] = COMPRESSED_TENSORS
    scale_leaf = names.scale

    def codes(self) -> Tensor:
        return self._unpacked()[0]

    def scales(self) -> Tensor:
        return marlin_24.order_scales(self.read(self.scale_leaf))

    def zeros(self) -> Tensor | None:
        return None

    def weight_problems(self) -> list[str]:
        problems: list[str] = []
        with collected(problems):
            self._places()
        return problems

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, Tensor]:
        return pack_used(*self._unpacked())

    def _places(self) -> Tensor:
        return marlin_24.read_places(self.read(self.names.meta), self.name, self.names)

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        return marlin_24.unpack_weight(self.read(self.names.packed), self._places())


class SparseMarlinLayer(Marlin24Layer):
    """The same by the names of Sparse-Marlin's checkpoints."""

    names = SPARSE_MARLIN
    scale_leaf = names.scale


class SparseMarlinFormat(TilesFormat):
    name = "sparse-marlin"
    markers = SPARSE_MARLIN
    packing = "marlin_24"
    methods = ("gptq_marlin_24", "marlin_24", "marlin")
    kernel = "Sparse-Marlin"
    layer_type = SparseMarlinLayer

    @classmethod
    def is_named_by(cls, source: Mapping[str, Any]) -> bool:
        return source.get("quant_method") in ("gptq_marlin_24", "marlin_24") or cls.packing in (
            source.get("checkpoint_format"),
            source.get("format"),
        )

    @staticmethod
    def sizes(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
        packed, scale, meta = (tensors[leaf] for leaf in SPARSE_MARLIN)
        return marlin_24.check_layout(packed, scale, meta, name, SPARSE_MARLIN)
