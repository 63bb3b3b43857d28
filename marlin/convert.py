"""Convert a quantized checkpoint, file by file, without building the model.

Memory: one layer, whatever the size of the model or of its shards. The result is exact: every
integer, scale, zero point and bias keeps its value (``marlin verify`` compares them).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marlin.examine import Layer, Survey, survey
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.native import config_for
from marlin.formats.shards import (
    Entry,
    ShardWriter,
    assign_shards,
    shard_name,
    tensor_bytes,
    write_file,
    write_index,
)
from marlin.formats.sparse import sparsify
from marlin.formats.staging import (
    check_space,
    destination_problem,
    disk_bytes,
    flush,
    partial_path,
    staged_directory,
)

SHARD_BYTES = 2 * 10**9
SMALL_FILE_BYTES = 200 * 10**6
REWRITTEN = ("config.json", "quantize_config.json", "quant_config.json")
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)


@dataclass(frozen=True)
class LayerReport:
    """One converted layer.

    ``group_size`` -1 is one group; ``zeros`` and ``act_order`` say whether it keeps zero points and
    an order of its features; ``dtype`` is that of its scales; sizes are bytes. ``sparse``: it is
    stored 2:4 sparse; ``dense_reason``: why it is not though it was asked for, else empty.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int
    zeros: bool
    act_order: bool
    bias: bool
    dtype: str
    bytes_before: int
    bytes_after: int
    sparse: bool = False
    dense_reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did or, after a dry run, would do. Sizes are bytes of tensors.

    ``source_format``: the ``quant_method`` of the source.
    """

    source: str
    source_format: str
    destination: str
    dry_run: bool
    layers: list[LayerReport]
    other_tensors: int
    bytes_before: int
    bytes_after: int
    shards: list[str]
    copied_files: list[str]
    skipped_files: list[str]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def _layer_report(layer: Layer) -> LayerReport:
    return LayerReport(
        name=layer.name,
        in_features=layer.source.in_features,
        out_features=layer.source.out_features,
        group_size=layer.source.group_size,
        zeros=layer.zeros,
        act_order=layer.act_order,
        bias=layer.bias,
        dtype=str(layer.dtype).removeprefix("torch."),
        bytes_before=layer.bytes_before,
        bytes_after=layer.bytes_after,
        sparse=layer.sparse,
        dense_reason=layer.dense_reason,
    )


def _units(checkpoint: Checkpoint, found: Survey) -> list[tuple[str, list[Entry]]]:
    """What is written, in reading order: (layer name, its tensors) or (tensor name, [itself])."""
    units: dict[str, list[Entry]] = {}
    for name, info in checkpoint.tensors.items():
        module = name.rpartition(".")[0]
        if module in found.layers:
            units.setdefault(module, found.layers[module].entries())
        else:
            units[name] = [Entry(name, info.dtype, info.shape)]
    return list(units.items())


def _small_files(source: Path) -> tuple[list[str], list[str]]:
    """Files to copy beside the tensors, and files to leave out: other weights, very large ones."""
    copied: list[str] = []
    skipped: list[str] = []
    for directory, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(directory, name)
            relative = str(path.relative_to(source))
            if relative in REWRITTEN or (
                directory == str(source) and name.endswith(WEIGHT_SUFFIXES[:2])
            ):
                continue
            small = path.is_file() and path.stat().st_size <= SMALL_FILE_BYTES
            keep = small and not name.startswith(".") and not name.endswith(WEIGHT_SUFFIXES)
            (copied if keep else skipped).append(relative)
    return copied, skipped


def _new_config(checkpoint: Checkpoint, found: Survey) -> bytes:
    config = dict(checkpoint.config)
    config["quantization_config"] = config_for(
        {name: layer.shape for name, layer in found.layers.items()}
    )
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


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


def _check_places(source: Path, destination: Path) -> None:
    inside = destination.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise CheckpointError(
            f"{destination} is the source or inside it; choose a folder elsewhere"
        )
    problem = destination_problem(destination)
    if problem:
        raise CheckpointError(problem)


def _write_layer(layer: Layer, writer: ShardWriter, bar: tqdm[Any]) -> None:
    packed = layer.source.pack(layer.source.parameters(layer.dtype))
    if layer.sparse and not layer.source.sparse:
        packed = sparsify(packed, layer.name)
    for leaf, tensor in packed._asdict().items():
        if isinstance(tensor, Tensor):
            tensor = tensor.contiguous()
            bar.update(writer.write(f"{layer.name}.{leaf}", [tensor_bytes(tensor)]))


def _write_all(
    checkpoint: Checkpoint,
    found: Survey,
    shards: dict[str, list[tuple[str, list[Entry]]]],
    copied: list[str],
    partial: Path,
    bar: tqdm[Any],
) -> None:
    for file, units in shards.items():
        with ShardWriter(partial / file, [entry for _, unit in units for entry in unit]) as writer:
            for name, _ in units:
                if name in found.layers:
                    _write_layer(found.layers[name], writer, bar)
                else:
                    bar.update(writer.write(name, checkpoint.read_bytes(name)))
    if len(shards) > 1:
        write_index(
            partial,
            {file: [e for _, unit in units for e in unit] for file, units in shards.items()},
        )
    for relative in copied:
        target = partial / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.directory / relative, target)
        flush(target)
    write_file(partial / "config.json", _new_config(checkpoint, found))


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
    source, destination = Path(src), Path(os.path.abspath(dst))
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype is {dtype}; choose torch.float16, torch.bfloat16, or None to keep the scales'"
        )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; give at least 1")
    checkpoint = Checkpoint.open(source)
    _check_places(source, destination)
    silent = not (progress and sys.stderr.isatty())
    with tqdm(desc="examining", unit="layer", disable=silent, leave=False) as bar:
        found = survey(
            checkpoint, dtype, lambda name: bar.update(), sparse or require_sparse, require_sparse
        )
    units = _units(checkpoint, found)
    split = assign_shards([entries for _, entries in units], shard_bytes)
    shards = {shard_name(i, len(split)): [units[u] for u in part] for i, part in enumerate(split)}
    copied, skipped = _small_files(source)
    bytes_after = sum(entry.nbytes for _, entries in units for entry in entries)
    small = sum((source / name).stat().st_size for name in copied)
    needed = bytes_after + small + (1 << 20)
    if dry_run:
        check_space(destination, needed, disk_bytes(partial_path(destination)))
    else:
        with (
            staged_directory(destination) as partial,
            tqdm(
                desc="converting", total=bytes_after, unit="B", unit_scale=True, disable=silent
            ) as bar,
        ):
            check_space(destination, needed)  # what a killed run left is gone by now
            _write_all(checkpoint, found, shards, copied, partial, bar)
    return ConversionReport(
        source=str(source),
        source_format=found.source.name,
        destination=str(destination),
        dry_run=dry_run,
        layers=[_layer_report(layer) for layer in found.layers.values()],
        other_tensors=len(found.others),
        bytes_before=sum(info.nbytes for info in checkpoint.tensors.values()),
        bytes_after=bytes_after,
        shards=list(shards),
        copied_files=copied,
        skipped_files=skipped,
        warnings=found.warnings + _dtype_warnings(checkpoint, found) + _dense_warnings(found),
        seconds=time.monotonic() - started,
    )
