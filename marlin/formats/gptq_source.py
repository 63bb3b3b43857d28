"""GPTQ checkpoints as a source of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.gptq import (
    LEAVES,
    GptqSettings,
    TensorSpec,
    layout_problems,
    parse_gptq_config,
    read_parameters,
    unpack_weight,
    unpack_zeros,
    zeros_are_ambiguous,
)
from marlin.formats.packed import SYMMETRIC_ZERO, Parameters
from marlin.formats.source import SourceFormat, SourceLayer


class GptqLayer(SourceLayer):
    """A layer whose tensors have passed :func:`marlin.formats.gptq.layout_problems`."""

    scale_leaf = "scales"

    def __init__(
        self, checkpoint: Checkpoint, name: str, words: int, n: int, settings: GptqSettings
    ) -> None:
        super().__init__(checkpoint, name, 8 * words, n, settings.group_size)
        self.settings = settings

    def codes(self) -> Tensor:
        return unpack_weight(self.read("qweight"))

    def scales(self) -> Tensor:
        return self.read("scales")

    def zeros(self) -> Tensor | None:
        return unpack_zeros(self.read("qzeros"), self.settings)

    def group_of_feature(self) -> Tensor:
        return self.read("g_idx").long()

    def parameters(self, dtype: torch.dtype | None) -> Parameters:
        qzeros, scales, g_idx = (self.read(leaf) for leaf in ("qzeros", "scales", "g_idx"))
        return read_parameters(self.name, qzeros, scales, g_idx, self.bias(), self.settings, dtype)

    def packed_weight(self, perm: Tensor | None) -> tuple[Tensor, None]:
        return torch.ops.marlin.repack_gptq(self.read("qweight"), perm), None

    def warning(self, rest: Parameters) -> str:
        if rest.zeros is None or not zeros_are_ambiguous(self.read("qzeros"), self.settings):
            return ""
        return (
            f"{self.name}: zero points of 0 in checkpoint_format gptq: tools differ on how they "
            "are stored; they are read nibble by nibble (GPTQModel's carry, and are read so when "
            "the config's meta.quantizer names it)"
        )


class GptqFormat(SourceFormat):
    name = "gptq"
    markers = ("qweight", "qzeros", "g_idx")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = parse_gptq_config(checkpoint.config, checkpoint.quantize_config)

    def layer(self, checkpoint: Checkpoint, name: str, leaves: Collection[str]) -> GptqLayer:
        settings = self._config.settings(name)
        if settings is None:
            raise CheckpointError(
                f"{name}: the config's dynamic excludes it, but it has {', '.join(leaves)}"
            )
        infos = {leaf: checkpoint.tensors[f"{name}.{leaf}"] for leaf in leaves if leaf in LEAVES}
        specs = {leaf: TensorSpec(info.torch_dtype, info.shape) for leaf, info in infos.items()}
        problems = self.stray_leaves(name, leaves, LEAVES)
        problems += layout_problems(name, specs, settings)
        if problems:
            raise CheckpointError(problems)
        words, n = specs["qweight"].shape
        return GptqLayer(checkpoint, name, words, n, settings)

    def checkpoint_problem(self, found: Iterable[tuple[SourceLayer, int | None]]) -> str:
        """Symmetric zero points read as the other checkpoint_format are all one off 8.

        No asymmetric layer has one zero point everywhere, let alone every layer of a checkpoint.
        """
        seen = {
            (layer.settings.zeros_version, only)
            for layer, only in found
            if isinstance(layer, GptqLayer)
        }
        for version, off, right in (
            (1, SYMMETRIC_ZERO + 1, "gptq_v2"),
            (2, SYMMETRIC_ZERO - 1, "gptq"),
        ):
            if seen == {(version, off)}:
                return (
                    f"checkpoint_format: every zero point of the checkpoint is {off} as the config "
                    f"has it, and 8, symmetric, with checkpoint_format {right!r}; that is probably "
                    f"what it is: set checkpoint_format to {right!r} in the config"
                )
        return ""
