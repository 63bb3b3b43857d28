"""Layers of other formats in a model whose tensors another loader fills, and packing them then.

The loader puts a layer's tensors, as its checkpoint has them, straight to their device. There they
are packed, one layer after the other, by the readers that ``marlin convert`` uses.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin.examine import Layer, Survey, survey
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.detect import source_format
from marlin.formats.packed import Parameters
from marlin.integrations._placeholders import cast_rounds, replace_module, warn_of_rounding
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24


def open_source(files: Sequence[str | Path], dtype: torch.dtype) -> tuple[Checkpoint, Survey]:
    """The checkpoint that consists of these files, examined for a model in ``dtype``.

    Scales and biases become ``dtype``, as with ``marlin convert --dtype``; but scales stored in the
    other 16-bit dtype are rounded, and a warning says so.

    Raises:
        CheckpointError: what ``marlin convert`` would refuse, in its words, or ``files`` are not
            all of the checkpoint.
        ValueError: ``dtype`` cannot hold the scales or biases of a layer.
    """
    directory = Path(files[0]).parent
    checkpoint = Checkpoint.open(directory)
    given = sorted(os.path.relpath(file, directory) for file in files)
    if given != sorted(checkpoint.files):
        raise CheckpointError(
            f"the checkpoint consists of {', '.join(checkpoint.files)}, and {', '.join(given)} are "
            "to be loaded: leave out variant= and subfolder=, or run `marlin convert`",
            where=directory,
        )
    try:
        found = survey(checkpoint, source_format(checkpoint))
    except CheckpointError as error:
        if not error.options:
            raise
        # Scales or biases that need to be told a dtype.
        found = survey(checkpoint, source_format(checkpoint), dtype)
    for warning in found.warnings:
        warnings.warn(warning, stacklevel=2)
    rounded = [name for name, layer in found.layers.items() if _is_rounded(layer, dtype)]
    if rounded:
        warn_of_rounding(rounded, found.layers[rounded[0]].dtype, dtype)
    return checkpoint, found


def _is_rounded(layer: Layer, dtype: torch.dtype) -> bool:
    if layer.dtype == dtype:
        return False
    rest = layer.source.parameters(None)
    return cast_rounds(layer.name, rest.scales, rest.bias, dtype)


class SourceLinear(nn.Module):
    """The tensors of a quantized layer by their names in its checkpoint, on the meta device."""

    def __init__(self, outlines: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """A place for each of the ``outlines``, floats in ``dtype``."""
        super().__init__()
        for leaf, outline in outlines.items():
            kind = dtype if outline.is_floating_point() else outline.dtype
            self.register_buffer(leaf, outline.to(kind))


def source_linears(
    checkpoint: Checkpoint, found: Survey, dtype: torch.dtype
) -> dict[str, SourceLinear]:
    """An empty place for each quantized layer."""
    outlines: dict[str, dict[str, Tensor]] = {name: {} for name in found.layers}
    for tensor in checkpoint.tensors:
        name, _, leaf = tensor.rpartition(".")
        if name in outlines:
            outlines[name][leaf] = checkpoint.outline(tensor)
    return {name: SourceLinear(leaves, dtype) for name, leaves in outlines.items()}


class _LoadedLayer(Checkpoint):
    """The part of a checkpoint that a loader has put into ``holder``, read from there.

    Tensors are moved to ``device``, and floats are cast to ``dtype``.
    """

    def __init__(self, layer: Layer, holder: nn.Module, device: torch.device, dtype: torch.dtype):
        files = layer.source.checkpoint
        super().__init__(files.directory, files.config, None, files.tensors)
        self.loaded = {f"{layer.name}.{leaf}": tensor for leaf, tensor in holder.named_buffers()}
        self.device, self.dtype = device, dtype

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        tensor = self.loaded[name][window]
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)


def pack_layers(model: nn.Module, layers: Mapping[str, Layer], dtype: torch.dtype) -> None:
    """Replace the ``SourceLinear`` at each of these names, now filled, by a packed layer.

    Raises:
        CheckpointError: a layer was offloaded, or the loader has put other values into it.
    """
    for name, layer in layers.items():
        holder = model.get_submodule(name)
        if any(tensor.is_meta for tensor in holder.buffers()):
            raise CheckpointError(
                f"{name}: offloaded before it was packed: leave out offload_buffers=True, or load "
                "what `marlin convert` makes of the checkpoint"
            )
        packed = _packed_layer(layer, holder, dtype)
        replace_module(model, name, packed)
        _keep_hook(holder, packed)


def _packed_layer(layer: Layer, holder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the device of the holder's tensors; all but the weight is worked out on the CPU."""
    device = next(holder.buffers()).device
    source = copy.copy(layer.source)
    source.checkpoint = _LoadedLayer(layer, holder, torch.device("cpu"), dtype)
    rest = source.parameters(dtype)
    source.checkpoint = _LoadedLayer(layer, holder, device, dtype)
    there: Any = {
        part: value if value is None else value.to(device) for part, value in vars(rest).items()
    }
    kind: Any = MarlinLinear24 if layer.sparse else MarlinLinear
    made: nn.Module = kind._around(source.pack(Parameters(**there)), layer.name)
    return made


def _keep_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hook by which accelerate moves activations to where ``old`` is."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
