"""A checkpoint directory: safetensors files, their index, and the configuration beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin.formats.container import TensorInfo, read_header, read_json
from marlin.formats.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]

CHUNK_BYTES = 1 << 24


@dataclass
class Checkpoint:
    """An opened checkpoint: headers and configuration are in memory, tensors are not.

    ``quantize_config`` and ``quant_config`` are the JSON files in which GPTQ and AWQ tools keep
    their settings, or None. ``tensors`` is in reading order: by file name, then by position in the
    file.
    """

    directory: Path
    config: dict[str, Any]
    quantize_config: dict[str, Any] | None
    tensors: dict[str, TensorInfo]
    files: list[str] = field(default_factory=list)
    quant_config: dict[str, Any] | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config, index and headers; :class:`CheckpointError` lists all that is wrong."""
        root = Path(directory)
        if not root.is_dir():
            state = "is not a directory" if root.exists() else "does not exist"
            raise CheckpointError(f"{state}; give the folder that holds config.json", where=root)
        try:
            names = sorted(entry.name for entry in root.iterdir())
        except OSError as error:
            raise CheckpointError(f"cannot be listed: {error.strerror}", where=root) from error
        problems: list[str] = []
        configs: dict[str, dict[str, Any]] = {}
        for file in ("config.json", "quantize_config.json", "quant_config.json"):
            if file == "config.json" or file in names:
                try:
                    configs[file] = read_json(root / file)
                except CheckpointError as error:
                    problems += error.refusals
        tensors, files, found = _open_files(root, names)
        if problems or found:
            raise CheckpointError(problems + found, where=root)
        return cls(
            root,
            configs["config.json"],
            configs.get("quantize_config.json"),
            tensors,
            files,
            configs.get("quant_config.json"),
        )

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        """One tensor, on the CPU; raises :class:`CheckpointError` if it cannot be read.

        ``window``: which of its rows, and of their columns, to read: up to two slices with start
        and stop.
        """
        info = self.tensors[name]
        dtype = info.torch_dtype
        if dtype is None:
            raise CheckpointError(f"tensor {name!r} is {info.dtype}, which this torch cannot hold")
        shape = list(info.shape)
        for dim, part in enumerate(window):
            shape[dim] = part.stop - part.start
        data = bytearray(prod(shape) * dtype.itemsize)
        rest = memoryview(data)
        with _opened(info) as file:
            for run in _runs(info, window):
                file.seek(info.start + run.start)
                place, rest = rest[: len(run)], rest[len(run) :]
                while place:
                    count = file.readinto(place[:CHUNK_BYTES])
                    if not count:
                        raise _became_shorter(info)
                    place = place[count:]
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def outline(self, name: str) -> Tensor:
        """A meta tensor of the dtype and shape of this one; nothing is read."""
        info = self.tensors[name]
        if info.torch_dtype is None:
            raise CheckpointError(f"tensor {name!r} is {info.dtype}, which this torch cannot hold")
        return torch.empty(info.shape, dtype=info.torch_dtype, device="meta")

    def read_bytes(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes of one tensor in chunks of at most ``chunk_bytes``."""
        info = self.tensors[name]
        left = info.nbytes
        with _opened(info) as file:
            while left:
                chunk = file.read(min(left, chunk_bytes))
                if not chunk:
                    raise _became_shorter(info)
                left -= len(chunk)
                yield chunk


@contextmanager
def _opened(info: TensorInfo) -> Iterator[FileIO]:
    """The file of a tensor, at its first byte."""
    try:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.start)
            yield file
    except OSError as error:
        raise CheckpointError(f"{info.path.name} cannot be read: {error.strerror}") from error


def _became_shorter(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.path.name} became shorter while it was read (tensor {info.name!r})"
    )


def _runs(info: TensorInfo, window: tuple[slice, ...]) -> Iterator[range]:
    """The bytes of a window of a tensor, as its runs without a gap."""
    if len(window) < 2:
        row = info.nbytes // info.shape[0] if window else info.nbytes
        part = window[0] if window else slice(0, 1)
        yield range(part.start * row, part.stop * row)
        return
    rows, columns = window
    if columns == slice(0, info.shape[1]):
        yield from _runs(info, (rows,))
        return
    cell = info.nbytes // (info.shape[0] * info.shape[1])
    for row in range(rows.start, rows.stop):
        first = row * info.shape[1]
        yield range((first + columns.start) * cell, (first + columns.stop) * cell)


def _open_files(root: Path, names: list[str]) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """Every tensor of the checkpoint, its safetensors files, and what is wrong with them."""
    problems: list[str] = []
    present = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    weight_map: dict[str, str] | None = None
    if len(indexes) > 1:
        problems.append(f"several indexes ({', '.join(indexes)}): keep the one that is meant")
    elif indexes:
        try:
            weight_map = _weight_map(root / indexes[0])
        except CheckpointError as error:
            return {}, [], list(error.refusals)
    elif len(present) > 1:
        problems.append(
            f"{len(present)} .safetensors files and no index ({', '.join(present)}): restore "
            "model.safetensors.index.json, or keep the one file that is meant"
        )
    if not present:
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        found = (
            f"; {', '.join(pickled)} are pickles: save them as safetensors first" if pickled else ""
        )
        problems.append(f"no .safetensors file{found}")
    wanted = present if weight_map is None else sorted(set(weight_map.values()))
    if weight_map is not None:
        problems += [
            f"{name} is named by the index but missing" for name in wanted if name not in present
        ]
        problems += [
            f"{name} is not named by the index: remove it, or the index is of another checkpoint"
            for name in present
            if name not in wanted
        ]
    tensors: dict[str, TensorInfo] = {}
    opened: dict[str, dict[str, TensorInfo]] = {}
    for file in wanted:
        if file not in present:
            continue
        try:
            header, _ = read_header(root / file)
        except CheckpointError as error:
            problems += error.refusals
            continue
        for name, info in header.items():
            if name in tensors:
                problems.append(f"tensor {name!r} is in both {tensors[name].path.name} and {file}")
            elif weight_map is not None and weight_map.get(name) != file:
                where = f"says {weight_map[name]}" if name in weight_map else "does not name it"
                problems.append(f"tensor {name!r} is in {file} but the index {where}")
            tensors[name] = info
        opened[file] = header
    problems += [
        f"tensor {name!r} is missing from {file}, where the index puts it"
        for name, file in (weight_map or {}).items()
        if file in opened and name not in opened[file]
    ]
    return tensors, wanted, problems


def _weight_map(path: Path) -> dict[str, str]:
    """The index's map from tensor to file, which must be a plain name in the same folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path.name} has no weight_map object")
    problems: list[str] = []
    for name, file in weight_map.items():
        if not isinstance(file, str):
            problems.append(f"{path.name}: tensor {name!r} maps to {file!r}, not a file name")
        elif (
            Path(file).name != file
            or "\\" in file
            or "\0" in file
            or not file.endswith(".safetensors")
        ):
            problems.append(
                f"{path.name}: tensor {name!r} maps to {file!r}; a shard must be a .safetensors "
                "file in the checkpoint's own folder"
            )
    if problems:
        raise CheckpointError(problems)
    return weight_map
