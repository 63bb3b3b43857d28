"""Read the header of a safetensors file, and JSON, strictly.

The safetensors container is read here rather than through its library for three reasons: a
converter must say everything that is wrong with a file, not only the first thing; tensors of a
dtype that torch does not know are copied as bytes; and a plain read of one tensor bounds the memory
used, which a mapping of the whole file does not. Format: 8 bytes little-endian header length, a
JSON header, then the data, without holes (https://github.com/huggingface/safetensors, README,
"Format").
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from marlin.formats.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, too
MAX_JSON_BYTES = 100_000_000
MAX_DIMENSIONS, MAX_ELEMENTS = 64, 2**63 - 1  # of a tensor, in torch

# safetensors name -> (bits per element, torch dtype or None when this torch has none)
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
}
DTYPE_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, which is the bytes [start, stop) of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype][1]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text``; duplicate keys, invalid UTF-8 and other values are refused."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode(
            "utf-8"
        )  # a lone surrogate could not be written
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, not an object")
    return value


def _regular_size(path: Path) -> int:
    """The size of a regular file; links are followed, since a model cache links to its blobs."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint."""
    if _regular_size(path) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return parse_json_object(path.read_bytes(), path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _header_entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One checked entry of a header; raises ValueError with the reason."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"its dtype {dtype!r} is unknown; known are {', '.join(DTYPES)}")

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    if not naturals(shape):
        raise ValueError(f"its shape {shape!r} is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS or prod(filter(None, shape)) > MAX_ELEMENTS:
        raise ValueError(
            f"its shape of {len(shape)} dimensions is larger than any tensor's: at most "
            f"{MAX_DIMENSIONS} dimensions, and sizes other than 0 whose product is at most 2^63 - 1"
        )
    if not naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"its data_offsets {offsets!r} are not [start, stop]")
    bits = prod(shape) * DTYPES[dtype][0]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{dtype} {shape} takes {bits / 8:g} bytes but its data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], base + offsets[1])


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file, in the order of their data, and its metadata.

    Raises :class:`CheckpointError` when the file is truncated, longer than its header says, or its
    header is malformed: a length beyond the file, invalid JSON, a name twice, unknown dtypes,
    overlaps or holes.
    """
    size = _regular_size(path)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path.name} is truncated: {size} bytes cannot hold its header"
                    + (f" of {length} bytes" if len(prefix) == 8 else "")
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path.name} claims a header of {length} bytes, beyond the format's limit of "
                    f"{MAX_HEADER_BYTES}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    header = parse_json_object(text, f"the header of {path.name}")
    metadata = header.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{path.name}: __metadata__ must map strings to strings")
    tensors: list[TensorInfo] = []
    for name, entry in header.items():
        try:
            tensors.append(_header_entry(path, name, entry, 8 + length))
        except ValueError as error:
            problems.append(f"{path.name}: tensor {name!r}: {error}")
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    if not problems:
        problems += _layout_problems(path, tensors, 8 + length, size)
    if problems:
        raise CheckpointError(problems)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _layout_problems(path: Path, tensors: list[TensorInfo], base: int, size: int) -> list[str]:
    """The data must be covered by the tensors exactly, without overlap, hole or tail."""
    position = base
    for tensor in tensors:
        if tensor.start != position:
            kind = (
                "overlaps the tensor before it"
                if tensor.start < position
                else "leaves a hole before it"
            )
            return [
                f"{path.name}: tensor {tensor.name!r} {kind} (byte {tensor.start}, want {position})"
            ]
        position = tensor.stop
    if size < position:
        return [f"{path.name} is truncated: its header needs {position} bytes, it has {size}"]
    if size > position:
        return [f"{path.name} has {size - position} bytes after its last tensor"]
    return []
