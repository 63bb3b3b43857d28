"""Export a converted checkpoint to a format that other tools read, without building the model.

The result is exact: every integer, scale, zero point, bias and group keeps its value (``marlin
verify`` compares them), and converting it again gives the same layers.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from marlin._conversion_report import ConversionReport
from marlin.examine import quantized_layers, survey
from marlin.formats.checkpoint import CheckpointError
from marlin.formats.gptq_target import GptqTarget
from marlin.formats.native_source import NativeFormat
from marlin.formats.source import collected
from marlin.formats.target import TargetFormat
from marlin.rewrite import SHARD_BYTES, Rewrite, open_source

TARGETS: dict[str, type[TargetFormat]] = {"gptq": GptqTarget}


def export(
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "gptq",
    dry_run: bool = False,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionReport:
    """Export the converted checkpoint in ``src`` into a new folder ``dst``; the inverse of
    :func:`marlin.convert`. ``src`` is never changed.

    ``format`` is ``"gptq"``: the settings are in ``config.json`` and ``quantize_config.json``, zero
    points as ``checkpoint_format`` says, which the report has as ``destination_format``: ``gptq``
    where all are 8, else ``gptq_v2``. Layers of another group size, and unquantized linear layers
    between quantized ones, are in ``dynamic``. 2:4 sparse layers become the dense ones that they
    equal.

    ``dry_run``, ``progress``, ``dtype`` and ``shard_bytes`` are those of :func:`marlin.convert`;
    as there, everything is checked before anything is written, and ``dst`` appears complete or not
    at all. Converting the result gives the same tensors, but for two things that change no weight:
    which zeros a 2:4 sparse layer stores where fewer than two weights of four are not zero, and an
    order of the features other than that of ``convert``, which keeps them rising within groups.

    Raises :class:`~marlin.formats.checkpoint.CheckpointError` with every reason for which the
    checkpoint is refused, :class:`ValueError` for another ``format``, and :class:`OSError` when a
    file cannot be written.
    """
    started = time.monotonic()
    if format not in TARGETS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(TARGETS)}")
    kind = TARGETS[format]
    destination = Path(os.path.abspath(dst))
    checkpoint = open_source(src, destination, dtype, shard_bytes)
    source = NativeFormat(checkpoint)
    stored = quantized_layers(checkpoint, source)
    problems = [problem for layer in stored.values() for problem in kind.problems(layer)]
    silent = not (progress and sys.stderr.isatty())
    with (
        collected(problems),
        tqdm(desc="examining", unit="layer", disable=silent, leave=False) as bar,
    ):
        found = survey(checkpoint, source, dtype, lambda name: bar.update())
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    layers = {name: replace(layer, sparse=False) for name, layer in found.layers.items()}
    target = kind(layers)
    entries = {name: target.entries(layer) for name, layer in layers.items()}
    rewrite = Rewrite(checkpoint, destination, replace(found, layers=layers), entries, shard_bytes)
    rewrite.run(
        target.tensors,
        target.configs(checkpoint),
        title="exporting",
        dry_run=dry_run,
        silent=silent,
    )
    return rewrite.report(
        target.stored_as,
        dry_run=dry_run,
        warnings=found.warnings + target.warnings(),
        seconds=time.monotonic() - started,
    )
