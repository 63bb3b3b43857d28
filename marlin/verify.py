"""Compare a converted checkpoint with the one it was made from, exactly and layer by layer.

Nothing is approximate: the packed integers are unpacked and compared with the source's, and so are
scales, zero points, the order of the features, biases (rounded, where the conversion was asked to,
to the dtype of the scales), and every byte of every other tensor. Files that are not tensors, such
as a tokenizer, are not compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marlin.examine import Survey, survey
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.detect import source_format
from marlin.formats.native import PackedShape, check_packed_tensors, packed_modules
from marlin.formats.packed import COMPUTE_DTYPES, SYMMETRIC_ZERO
from marlin.formats.source import SourceLayer
from marlin.formats.sparse import places_problem, zero_codes


@dataclass(frozen=True)
class LayerResult:
    """One compared layer; ``problem`` says where it first differs, None means that it is equal."""

    name: str
    weights: int
    problem: str | None


@dataclass(frozen=True)
class VerifyReport:
    """``layers`` are the quantized ones; ``mismatches`` lists theirs and all others."""

    source: str
    destination: str
    layers: list[LayerResult]
    other_tensors: int
    mismatches: list[str]

    @property
    def equal(self) -> bool:
        return not self.mismatches

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "equal": self.equal}


def _first_difference(got: Tensor, want: Tensor) -> tuple[int, ...] | None:
    """The index of the first element of another value, whatever its dtype, or None."""
    if got.shape != want.shape:
        return (0,) * want.dim()
    if got.dtype != want.dtype:
        got, want = got.double(), want.double()
    if torch.equal(got, want):
        return None
    return tuple(int(i) for i in (got != want).nonzero()[0])


def _differences(source: SourceLayer, dst: Checkpoint, shape: PackedShape) -> Iterator[str]:
    name, k, n, groups = source.name, shape.in_features, shape.out_features, source.groups
    g_idx = source.group_of_feature()
    perm_name, zeros_name = f"{name}.perm", f"{name}.zeros"
    perm = dst.read(perm_name).long() if perm_name in dst.tensors else torch.arange(k)
    if not torch.equal(perm.sort().values, torch.arange(k)):
        yield f"{name}: perm is not a permutation of 0..{k - 1}"
        return
    sorted_groups = (
        torch.arange(k) // source.group_size if groups > 1 else torch.zeros(k, dtype=torch.long)
    )
    at = _first_difference(g_idx[perm], sorted_groups)
    if at is not None:
        column = int(perm[at[0]])
        got_group, want_group = int(g_idx[column]), int(sorted_groups[at])
        yield f"{name}: input feature {column} is in group {got_group}, packed into {want_group}"
    want = source.codes()[:, perm]
    want_zeros = source.zeros()
    if shape.sparse:
        places = dst.read(f"{name}.places")
        problem = places_problem(places)
        if problem:
            yield f"{name}: {problem}"
            return
        got, stored = torch.ops.marlin.unpack_24(dst.read(f"{name}.qweight"), places, n, k)
        got = torch.where(stored, got, zero_codes(want_zeros, k))
    else:
        got = torch.ops.marlin.unpack(dst.read(f"{name}.qweight"), n, k)
    at = _first_difference(got, want)
    if at is not None:
        column = int(perm[at[1]])
        yield f"{name}: weight row {at[0]}, column {column} is {int(got[at])}, want {int(want[at])}"
    del got, want
    eight = torch.full((groups, n), SYMMETRIC_ZERO, dtype=torch.uint8)
    pairs = {
        "scales": (dst.read(f"{name}.scales"), source.scales()),
        "zeros": (
            dst.read(zeros_name) if zeros_name in dst.tensors else eight,
            eight if want_zeros is None else want_zeros,
        ),
    }
    bias, stored_bias = source.bias(), f"{name}.bias"
    if (bias is not None) != (stored_bias in dst.tensors):
        yield f"{name}: bias is {'not in the source' if bias is None else 'missing'}"
    elif bias is not None:
        stored = dst.read(stored_bias)
        pairs["bias"] = (stored, bias.to(stored.dtype))
    for leaf, (found, expected) in pairs.items():
        at = _first_difference(found, expected)
        if at is not None:
            place = f"column {at[0]}" if leaf == "bias" else f"row {at[0]} (group), column {at[1]}"
            yield f"{name}: {leaf} {place} is {found[at].item()}, want {expected[at].item()}"


def _other_differences(name: str, src: Checkpoint, dst: Checkpoint) -> Iterator[str]:
    got, want = dst.tensors.get(name), src.tensors[name]
    if got is None:
        yield f"{name}: missing"
    elif (got.dtype, got.shape) != (want.dtype, want.shape):
        yield f"{name}: is {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}"
    else:
        position = 0
        for ours, theirs in zip_longest(dst.read_bytes(name), src.read_bytes(name), fillvalue=b""):
            if ours != theirs:
                first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                yield f"{name}: byte {position + first} is {ours[first]}, want {theirs[first]}"
                return
            position += len(ours)


def _structure(found: Survey, dst: Checkpoint, modules: dict[str, PackedShape]) -> Iterator[str]:
    """Layers and tensors that are in one of the two only, or of other sizes."""
    for name, layer in found.layers.items():
        if name not in modules:
            yield f"{name}: quantized in the source, not listed in the converted config"
        elif modules[name] != layer.shape:
            yield f"{name}: config says {modules[name]}, want {layer.shape}"
    yield from (
        f"{name}: not a quantized layer of the source"
        for name in modules
        if name not in found.layers
    )
    expected = {entry.name for layer in found.layers.values() for entry in layer.entries()} | set(
        found.others
    )
    optional = {f"{name}.{leaf}" for name in found.layers for leaf in ("zeros", "perm", "bias")}
    yield from (
        f"{name}: not in the source" for name in dst.tensors if name not in expected | optional
    )


def _chosen_dtype(src: Checkpoint, dst: Checkpoint) -> torch.dtype | None:
    """The ``--dtype`` of the conversion: it matters only where the source's scales are float32, or
    a bias has another dtype than they.
    """
    leaves = source_format(src).scale_leaves
    scales = {
        name.rpartition(".")[0]: info.dtype
        for name, info in src.tensors.items()
        if name.rpartition(".")[2] in leaves
    }
    biases = {f"{name}.bias": dtype for name, dtype in scales.items()}
    if "F32" not in scales.values() and not any(
        name in src.tensors and src.tensors[name].dtype != dtype for name, dtype in biases.items()
    ):
        return None
    stored = {info.torch_dtype for name, info in dst.tensors.items() if name.endswith(".scales")}
    return next((dtype for dtype in COMPUTE_DTYPES if dtype in stored), None)


def verify(dst: str | Path, src: str | Path, *, progress: bool = True) -> VerifyReport:
    """Compare the converted checkpoint ``dst`` with its source ``src``, both read only.

    Returns a report whose ``mismatches`` names the layer, row (output feature) and column (input
    feature) of the first difference of each tensor. Raises
    :class:`~marlin.formats.checkpoint.CheckpointError` when either cannot be read.
    """
    source, converted = Checkpoint.open(src), Checkpoint.open(dst)
    modules = packed_modules(converted.config)
    check_packed_tensors(converted, modules)
    found = survey(source, source_format(source), _chosen_dtype(source, converted))
    for name, shape in modules.items():  # which are sparse, the source cannot say
        if name in found.layers:
            found.layers[name] = replace(found.layers[name], sparse=shape.sparse)
    mismatches = list(_structure(found, converted, modules))
    layers: list[LayerResult] = []
    silent = not (progress and sys.stderr.isatty())
    for name, layer in tqdm(
        found.layers.items(), desc="verifying", unit="layer", disable=silent, leave=False
    ):
        if modules.get(name) != layer.shape:
            differences = ["its sizes differ"]
        else:
            differences = list(_differences(layer.source, converted, modules[name]))
            mismatches += differences
        weights = layer.source.in_features * layer.source.out_features
        layers.append(LayerResult(name, weights, differences[0] if differences else None))
    for name in found.others:
        mismatches += _other_differences(name, source, converted)
    return VerifyReport(str(src), str(dst), layers, len(found.others), mismatches)
