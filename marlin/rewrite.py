"""Write a checkpoint anew with other tensors for its quantized layers: what ``convert`` and
``export`` share.

Memory: one layer, whatever the size of the model or of its shards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marlin._conversion_report import ConversionReport, LayerReport
from marlin.examine import Layer, Survey
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.shards import (
    Entry,
    ShardWriter,
    assign_shards,
    shard_name,
    tensor_bytes,
    write_file,
    write_index,
)
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

Unit = tuple[str, Sequence[Entry]]


def open_source(
    src: str | Path, destination: Path, dtype: torch.dtype | None, shard_bytes: int
) -> Checkpoint:
    """The checkpoint in ``src``, once it, ``destination`` and the options can be used.

    Raises:
        CheckpointError: ``src`` cannot be read, or ``destination`` cannot be created.
        ValueError: an option is out of its range.
    """
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype is {dtype}; choose torch.float16, torch.bfloat16, or None to keep the scales'"
        )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; give at least 1")
    source = Path(src)
    checkpoint = Checkpoint.open(source)
    inside = destination.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise CheckpointError(
            f"{destination} is the source or inside it; choose a folder elsewhere"
        )
    problem = destination_problem(destination)
    if problem:
        raise CheckpointError(problem)
    staging = destination.parent.resolve() / partial_path(destination).name
    if staging in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(
            f"{source} is in {staging}, which is emptied before {destination} is written; move the "
            "source, or choose a destination of another name"
        )
    return checkpoint


class Rewrite:
    """What is to be written, in which files: all that is known before the first byte.

    ``entries`` are the new tensors of each quantized layer of ``found``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        destination: Path,
        found: Survey,
        entries: Mapping[str, Sequence[Entry]],
        shard_bytes: int,
    ) -> None:
        self.checkpoint, self.destination, self._found = checkpoint, destination, found
        self._entries = entries
        units = self._units()
        split = assign_shards([unit for _, unit in units], shard_bytes)
        self.shards = {
            shard_name(i, len(split)): [units[u] for u in part] for i, part in enumerate(split)
        }
        self.copied_files, self.skipped_files = _small_files(checkpoint.directory)
        self.bytes_after = sum(entry.nbytes for _, unit in units for entry in unit)

    def _units(self) -> list[Unit]:
        """In reading order: (layer name, its tensors) or (tensor name, [itself])."""
        units: dict[str, Sequence[Entry]] = {}
        for name, info in self.checkpoint.tensors.items():
            module = name.rpartition(".")[0]
            if module in self._entries:
                units.setdefault(module, self._entries[module])
            else:
                units[name] = [Entry(name, info.dtype, info.shape)]
        return list(units.items())

    def run(
        self,
        make: Callable[[Layer], Mapping[str, Tensor]],
        configs: Mapping[str, Mapping[str, Any]],
        *,
        title: str,
        dry_run: bool,
        silent: bool,
    ) -> None:
        """Write everything; ``dry_run``: only see whether there is space for it.

        ``make`` returns a layer's tensors by leaf name; ``configs`` are JSON files by name.
        """
        copied = [self.checkpoint.directory / name for name in self.copied_files]
        needed = self.bytes_after + sum(path.stat().st_size for path in copied) + (1 << 20)
        if dry_run:
            check_space(self.destination, needed, disk_bytes(partial_path(self.destination)))
            return
        with (
            staged_directory(self.destination) as partial,
            tqdm(
                desc=title, total=self.bytes_after, unit="B", unit_scale=True, disable=silent
            ) as bar,
        ):
            check_space(self.destination, needed)  # what a killed run left is gone by now
            self._write_all(partial, make, configs, bar)

    def _write_all(
        self,
        partial: Path,
        make: Callable[[Layer], Mapping[str, Tensor]],
        configs: Mapping[str, Mapping[str, Any]],
        bar: tqdm[Any],
    ) -> None:
        files = {
            file: [entry for _, unit in units for entry in unit]
            for file, units in self.shards.items()
        }
        for file, units in self.shards.items():
            with ShardWriter(partial / file, files[file]) as writer:
                for name, _ in units:
                    if name in self._entries:
                        _write_layer(name, make(self._found.layers[name]), writer, bar)
                    else:
                        bar.update(writer.write(name, self.checkpoint.read_bytes(name)))
        if len(files) > 1:
            write_index(partial, files)
        for relative in self.copied_files:
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.checkpoint.directory / relative, target)
            flush(target)
        for file, config in configs.items():
            write_file(partial / file, _json_bytes(config))

    def report(
        self,
        destination_format: str,
        *,
        dry_run: bool,
        warnings: list[str],
        seconds: float,
    ) -> ConversionReport:
        return ConversionReport(
            source=str(self.checkpoint.directory),
            source_format=self._found.source.name,
            destination=str(self.destination),
            destination_format=destination_format,
            dry_run=dry_run,
            layers=[
                _layer_report(layer, self._entries[name])
                for name, layer in self._found.layers.items()
            ],
            other_tensors=len(self._found.others),
            bytes_before=sum(info.nbytes for info in self.checkpoint.tensors.values()),
            bytes_after=self.bytes_after,
            shards=list(self.shards),
            copied_files=self.copied_files,
            skipped_files=self.skipped_files,
            warnings=warnings,
            seconds=seconds,
        )


def _layer_report(layer: Layer, entries: Sequence[Entry]) -> LayerReport:
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
        bytes_after=sum(entry.nbytes for entry in entries),
        sparse=layer.sparse,
        dense_reason=layer.dense_reason,
    )


def _small_files(source: Path) -> tuple[list[str], list[str]]:
    """Files to copy beside the tensors, and what to leave out.

    The latter are other weights, very large files, and folders that are links or cannot be read.
    """
    copied: list[str] = []
    skipped: list[str] = []

    def unreadable(error: OSError) -> None:
        skipped.append(os.path.relpath(error.filename, source) + os.sep)

    for directory, folders, files in os.walk(source, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = (Path(directory, name) for name in folders)
        skipped += [f"{path.relative_to(source)}{os.sep}" for path in links if path.is_symlink()]
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
            if keep and not os.access(path, os.R_OK):
                raise CheckpointError(f"{relative} cannot be read; allow it, or move it elsewhere")
    return copied, skipped


def _write_layer(
    name: str, tensors: Mapping[str, Tensor], writer: ShardWriter, bar: tqdm[Any]
) -> None:
    for leaf, tensor in tensors.items():
        tensor = tensor.contiguous()
        bar.update(writer.write(f"{name}.{leaf}", [tensor_bytes(tensor)]))


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
