"""Write safetensors shards tensor by tensor, so that a shard is never held in memory.

Sizes and dtypes are known before the data: the header is written first, and every tensor goes to
its own place in the file in any order. Readers map the file and view tensors in place, so these
must be aligned, and the format allows no holes: the data begins at a multiple of 64 bytes, first
come the tensors whose sizes are multiples of 64 (every packed weight), then the others by falling
element size.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from marlin.formats.container import DTYPES
from marlin.formats.errors import CheckpointError

ALIGNMENT = 64  # bytes: a cache line; the kernels need 16
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][0] // 8


def assign_shards(units: Sequence[Sequence[Entry]], shard_bytes: int) -> list[list[int]]:
    """Split ``units``, tensors that stay together, into shards of at most ``shard_bytes``.

    Returns the unit numbers of each shard. A unit larger than ``shard_bytes`` gets a shard of its
    own.
    """
    shards: list[list[int]] = [[]]
    used = 0
    for number, unit in enumerate(units):
        size = sum(entry.nbytes for entry in unit)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(number)
        used += size
    return shards


def shard_name(number: int, count: int) -> str:
    """The file name of shard ``number``, from 0, of ``count``."""
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    return (
        memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()))
        if size
        else memoryview(b"")
    )


class ShardWriter:
    """One safetensors file being written; the context, left normally, has it on the disk."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        ordered = sorted(entries, key=lambda e: (e.nbytes % ALIGNMENT != 0, -DTYPES[e.dtype][0]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        position = 0
        for entry in ordered:
            stop = position + entry.nbytes
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [position, stop],
            }
            self._places[entry.name] = (position, entry.nbytes)
            position = stop
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._base = 8 + len(text)
        self._head = len(text).to_bytes(8, "little") + text
        self._path = path

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write all of one tensor; returns its size in bytes.

        Raises :class:`CheckpointError` when it is not of the size that was announced.
        """
        start, size = self._places.pop(name, (0, -1))
        done = 0
        for chunk in chunks:
            if done + len(chunk) > size:
                break
            self._write(self._base + start + done, chunk)
            done += len(chunk)
        if done != size:
            raise CheckpointError(
                f"{name} changed while it was converted; run the conversion again"
            )
        return size

    def _write(self, position: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while view:
            try:
                done = os.pwrite(self._file.fileno(), view, position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            position += done
            view = view[done:]

    def __enter__(self) -> ShardWriter:
        self._file = self._path.open("xb", buffering=0)
        try:
            self._write(0, self._head)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                if self._places:
                    names = ", ".join(self._places)
                    raise CheckpointError(
                        f"{names} vanished while they were converted; run it again"
                    )
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: Path, shards: dict[str, list[Entry]]) -> None:
    """Write the index of several shards: which file holds which tensor."""
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(directory / INDEX_NAME, json.dumps(index, indent=2, ensure_ascii=False).encode())
