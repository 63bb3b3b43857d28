"""Convert a quantized checkpoint, file by file, without building the model.

Memory: one layer, whatever the size of the model or of its shards. The result is exact: every
integer, scale, zero point and bias keeps its value (``marlin verify`` compares them).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marlin._conversion_report import ConversionReport, LayerReport
from marlin.examine import Layer, Survey, survey
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.detect import source_format
from marlin.formats.native import config_for
from marlin.formats.sparse import sparsify
from marlin.rewrite import SHARD_BYTES, Rewrite, open_source

__all__ = ["SHARD_BYTES", "ConversionReport", "LayerReport", "convert"]


def _new_config(checkpoint: Checkpoint, found: Survey) -> dict[str, Any]:
    modules = {name: layer.shape for name, layer in found.layers.items()}
    return {**checkpoint.config, "quantization_config": config_for(modules)}


def _dtype_warnings(checkpoint: Checkpoint, found: Survey) -> list[str]:
    """The kernels want activations in the dtype of the scales: say when the config differs."""
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtypes = sorted({str(layer.dtype).removeprefix("torch.") for layer in found.layers.values()})
    if stated in ("float16", "bfloat16", "float32") and dtypes != [stated]:
        return [
            f"config.json says {stated} but the scales are {', '.join(dtypes)}: run the model in "
            "that dtype"
        ]
    return []


def _dense_warnings(found: Survey) -> list[str]:
    reasons = [layer.dense_reason for layer in found.layers.values()]
    if not all(reasons):
        return []
    return ["no layer is 2:4 sparse: all stay dense; prune the model before it is quantized"]


def _packed_tensors(layer: Layer) -> dict[str, Tensor]:
    packed = layer.source.pack(layer.source.parameters(layer.dtype))
    if layer.sparse and not layer.source.sparse:
        packed = sparsify(packed, layer.name)
    return {leaf: part for leaf, part in packed._asdict().items() if isinstance(part, Tensor)}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dry_run: bool = False,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    sparse: bool = False,
    require_sparse: bool = False,
) -> ConversionReport:
    """Convert the checkpoint in ``src`` into a new folder ``dst``. ``src`` is never changed.

    ``src`` is in one of the formats of :mod:`marlin.formats.detect`, as its config says.

    Everything is checked before anything is written; ``dry_run`` stops there. ``dst`` must not
    exist, or be an empty folder; it appears complete, by one rename, or not at all. ``dtype``
    (float16 or bfloat16) asks for scales in that dtype, which must hold them exactly, and for
    biases rounded to it; None keeps the scales', which must hold the biases exactly.
    ``shard_bytes`` bounds the output's files. ``progress`` shows a bar when standard error is a
    terminal.

    ``sparse`` stores the layers 2:4 sparse whose weights are: of every four neighbouring input
    features at most two have a code other than the zero point, and there is no act-order. The
    others stay dense; the report says why. ``require_sparse`` refuses them, and implies ``sparse``.

    Raises :class:`~marlin.formats.checkpoint.CheckpointError` with every reason for which the
    checkpoint is refused, and :class:`OSError` when a file cannot be written.
    """
    started = time.monotonic()
    destination = Path(os.path.abspath(dst))
    checkpoint = open_source(src, destination, dtype, shard_bytes)
    silent = not (progress and sys.stderr.isatty())
    with tqdm(desc="examining", unit="layer", disable=silent, leave=False) as bar:
        found = survey(
            checkpoint,
            source_format(checkpoint),
            dtype,
            lambda name: bar.update(),
            sparse or require_sparse,
            require_sparse,
        )
    entries = {name: layer.entries() for name, layer in found.layers.items()}
    rewrite = Rewrite(checkpoint, destination, found, entries, shard_bytes)
    configs = {"config.json": _new_config(checkpoint, found)}
    rewrite.run(_packed_tensors, configs, title="converting", dry_run=dry_run, silent=silent)
    return rewrite.report(
        "marlin",
        dry_run=dry_run,
        warnings=found.warnings + _dtype_warnings(checkpoint, found) + _dense_warnings(found),
        seconds=time.monotonic() - started,
    )
