"""GPTQ as a format to export to: the tensors of :mod:`marlin.formats.gptq` and their settings.

A checkpoint whose zero points are all 8 is stored as version 1 (``checkpoint_format: gptq``), which
every reader of GPTQ takes. Any other is version 2 (``gptq_v2``): tools differ on what version 1, a
zero point minus one, makes of a zero point of 0, and GPTQModel reads asymmetric layers of version 1
only from itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import DTYPE_NAMES
from marlin.formats.packed import SYMMETRIC_ZERO
from marlin.formats.shards import Entry
from marlin.formats.source import SourceLayer
from marlin.formats.target import TargetFormat

if TYPE_CHECKING:
    from marlin.examine import Layer

WORD = 8  # nibbles of an int32


def pack_words(nibbles: Tensor) -> Tensor:
    """uint8 ``[rows, columns]`` of 0..15 -> int32 ``[rows, columns / 8]``, nibble i at bit 4i."""
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(torch.int32)  # little-endian bytes


class GptqTarget(TargetFormat):
    name = "gptq"

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._symmetric = not any(layer.zeros for layer in layers.values())
        self.stored_as = "gptq" if self._symmetric else "gptq_v2"
        sizes = Counter(layer.source.group_size for layer in layers.values())
        self._group_size = sizes.most_common(1)[0][0]

    @staticmethod
    def problems(layer: SourceLayer) -> list[str]:
        sizes = {
            "in_features": (layer.in_features, "weights of 8 input features"),
            "out_features": (layer.out_features, "zero points of 8 output features"),
        }
        return [
            f"{layer.name}: {name}: got {size}; GPTQ packs the {what} into a word, so it must be a "
            "multiple of 8; keep such a layer in this package's format"
            for name, (size, what) in sizes.items()
            if size % WORD
        ]

    def entries(self, layer: Layer) -> list[Entry]:
        k, n, groups = layer.source.in_features, layer.source.out_features, layer.source.groups
        dtype = DTYPE_NAMES[layer.dtype]
        leaves: list[tuple[str, str, tuple[int, ...]]] = [
            ("qweight", "I32", (k // WORD, n)),
            ("qzeros", "I32", (groups, n // WORD)),
            ("scales", dtype, (groups, n)),
            ("g_idx", "I32", (k,)),
        ]
        if layer.bias:
            leaves.append(("bias", dtype, (n,)))
        return [Entry(f"{layer.name}.{leaf}", kind, shape) for leaf, kind, shape in leaves]

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        rest = layer.source.parameters(layer.dtype)
        if (rest.zeros is not None) != layer.zeros:
            raise CheckpointError(
                f"{layer.name}.zeros changed while it was exported; run the export again"
            )
        zeros = rest.zeros
        if zeros is None:
            shape = layer.source.groups, layer.source.out_features
            zeros = torch.full(shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        if self.stored_as == "gptq":
            zeros = zeros - 1
        tensors = {
            "qweight": pack_words(layer.source.codes()).T,
            "qzeros": pack_words(zeros),
            "scales": rest.scales,
            "g_idx": layer.source.group_of_feature().int(),
        }
        return tensors if rest.bias is None else {**tensors, "bias": rest.bias}

    def configs(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        settings = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self._group_size,
            "sym": self._symmetric,
            "desc_act": any(layer.act_order for layer in self._layers.values()),
            "checkpoint_format": self.stored_as,
            "pack_dtype": "int32",
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in self._layers),
        }
        dynamic = self._dynamic(checkpoint)
        if dynamic:
            settings["dynamic"] = dynamic
        return {
            "config.json": {**checkpoint.config, "quantization_config": settings},
            "quantize_config.json": settings,
        }

    def _dynamic(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """The settings of modules that differ from the rest: readers take every linear layer of a
        quantized block for a quantized one, and of the one group size.
        """
        blocks = {_blocks(name) for name in self._layers} - {""}
        unquantized = [
            module
            for name, info in checkpoint.tensors.items()
            for module, _, leaf in [name.rpartition(".")]
            if leaf == "weight" and len(info.shape) == 2 and _blocks(module) in blocks
        ]
        return {f"-:^{re.escape(name)}$": {} for name in unquantized} | {
            f"+:^{re.escape(name)}$": {"group_size": layer.source.group_size}
            for name, layer in self._layers.items()
            if layer.source.group_size != self._group_size
        }

    def warnings(self) -> list[str]:
        found = []
        bf16 = sum(layer.dtype != torch.float16 for layer in self._layers.values())
        if bf16:
            found.append(
                f"bfloat16 scales in {bf16} of {len(self._layers)} layers: some readers of GPTQ "
                "round them to float16; dtype float16 stores them so, where that is exact"
            )
        sparse = sum(layer.source.sparse for layer in self._layers.values())
        if sparse:
            found.append(
                f"2:4 sparse weights in {sparse} of {len(self._layers)} layers: GPTQ has no form "
                "for them; they are written as the dense ones that they equal"
            )
        return found


def _blocks(module: str) -> str:
    """``model.layers`` of ``model.layers.0.mlp``: where the blocks of a model are; else nothing."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[:first])
