"""Compare two checkpoints of the same quantized model, exactly and layer by layer.

One was made from the other by ``convert`` or ``export``. Nothing is approximate: the packed
integers of both are unpacked and compared, and so are scales, zero points, the groups of the
features, biases (rounded, where the conversion was asked to, to the dtype of the scales), and every
byte of every other tensor. Files that are not tensors, such as a tokenizer, are not compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marlin.examine import Survey, quantized_layers, survey
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.detect import readable_format
from marlin.formats.packed import COMPUTE_DTYPES, SYMMETRIC_ZERO
from marlin.formats.source import SourceFormat, SourceLayer


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


def _differences(got: SourceLayer, want: SourceLayer) -> Iterator[str]:
    name = want.name
    damage = got.weight_problems()
    if damage:
        yield from damage
        return
    got_groups, want_groups = got.group_of_feature(), want.group_of_feature()
    at = _first_difference(got_groups, want_groups)
    if at is not None:
        yield f"{name}: input feature {at[0]} is in group {got_groups[at]}, want {want_groups[at]}"
    got_codes, want_codes = got.codes(), want.codes()
    at = _first_difference(got_codes, want_codes)
    if at is not None:
        row, column = at
        yield (
            f"{name}: weight row {row}, column {column} is {got_codes[at]}, want {want_codes[at]}"
        )
    del got_codes, want_codes
    pairs = {
        "scales": (got.scales(), want.scales()),
        "zeros": (_zero_points(got), _zero_points(want)),
    }
    got_bias, want_bias = got.bias(), want.bias()
    if got_bias is not None and want_bias is not None:
        pairs["bias"] = (got_bias, want_bias.to(got_bias.dtype))
    elif got_bias is not want_bias:
        yield f"{name}: bias is {'not in the source' if want_bias is None else 'missing'}"
    for leaf, (found, expected) in pairs.items():
        at = _first_difference(found, expected)
        if at is not None:
            place = f"column {at[0]}" if leaf == "bias" else f"row {at[0]} (group), column {at[1]}"
            yield f"{name}: {leaf} {place} is {found[at].item()}, want {expected[at].item()}"


def _zero_points(layer: SourceLayer) -> Tensor:
    zeros = layer.zeros()
    if zeros is not None:
        return zeros
    return torch.full((layer.groups, layer.out_features), SYMMETRIC_ZERO, dtype=torch.uint8)


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


def _sizes(layer: SourceLayer) -> str:
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, "
        f"group_size={layer.group_size}"
    )


def _structure(found: Survey, layers: Mapping[str, SourceLayer], dst: Checkpoint) -> Iterator[str]:
    """Layers and tensors that are in one of the two only, or of other sizes."""
    for name, layer in found.layers.items():
        if name not in layers:
            yield f"{name}: quantized in the source, not in {dst.directory}"
        elif _sizes(layers[name]) != _sizes(layer.source):
            yield f"{name}: is {_sizes(layers[name])}, want {_sizes(layer.source)}"
    yield from (
        f"{name}: not a quantized layer of the source"
        for name in layers
        if name not in found.layers
    )
    expected = set(found.others)
    yield from (
        f"{name}: not in the source"
        for name in dst.tensors
        if name not in expected and name.rpartition(".")[0] not in layers
    )


def _chosen_dtype(
    source: SourceFormat, src: Checkpoint, layers: Mapping[str, SourceLayer]
) -> torch.dtype | None:
    """The ``--dtype`` of the conversion into ``layers``: it matters only where the source's scales
    are float32, or a bias has another dtype than they.
    """
    scales = {
        name.rpartition(".")[0]: info.dtype
        for name, info in src.tensors.items()
        if name.rpartition(".")[2] in source.scale_leaves
    }
    biases = {f"{name}.bias": dtype for name, dtype in scales.items()}
    if "F32" not in scales.values() and not any(
        name in src.tensors and src.tensors[name].dtype != dtype for name, dtype in biases.items()
    ):
        return None
    stored = {
        layer.checkpoint.tensors[f"{name}.{layer.scale_leaf}"].torch_dtype
        for name, layer in layers.items()
    }
    return next((dtype for dtype in COMPUTE_DTYPES if dtype in stored), None)


def verify(dst: str | Path, src: str | Path, *, progress: bool = True) -> VerifyReport:
    """Compare the checkpoint ``dst`` with ``src``, from which it was made, both read only.

    One is converted and the other its source, or exported from it; any two formats of
    :mod:`marlin.formats.detect` can be compared.

    Returns a report whose ``mismatches`` names the layer, row (output feature) and column (input
    feature) of the first difference of each tensor. Raises
    :class:`~marlin.formats.checkpoint.CheckpointError` when either cannot be read, or both are one.
    """
    if Path(src).resolve() == Path(dst).resolve():
        raise CheckpointError(
            f"{dst} would be compared with itself; give the checkpoint that it was made from"
        )
    source, made = Checkpoint.open(src), Checkpoint.open(dst)
    layers_made = quantized_layers(made, readable_format(made))
    format_of_source = readable_format(source)
    dtype = _chosen_dtype(format_of_source, source, layers_made)
    found = survey(source, format_of_source, dtype)
    mismatches = list(_structure(found, layers_made, made))
    layers: list[LayerResult] = []
    silent = not (progress and sys.stderr.isatty())
    for name, layer in tqdm(
        found.layers.items(), desc="verifying", unit="layer", disable=silent, leave=False
    ):
        if name not in layers_made or _sizes(layers_made[name]) != _sizes(layer.source):
            differences = ["its sizes differ"]
        else:
            differences = list(_differences(layers_made[name], layer.source))
            mismatches += differences
        weights = layer.source.in_features * layer.source.out_features
        layers.append(LayerResult(name, weights, differences[0] if differences else None))
    for name in found.others:
        mismatches += _other_differences(name, source, made)
    return VerifyReport(str(src), str(dst), layers, len(found.others), mismatches)
