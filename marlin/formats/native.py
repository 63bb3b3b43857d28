"""The checkpoints that ``marlin convert`` writes: their configuration and the shapes it implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import DTYPE_NAMES
from marlin.formats.gptq_config import GROUP_SIZES
from marlin.formats.packed import COMPUTE_DTYPES, group_count, operands
from marlin.formats.sparse import QUAD, places_problem

DENSE_VERSION = 1
SPARSE_VERSION = 2  # has 2:4 sparse layers: readers of version 1 must not take them for dense ones
LEAVES = ("qweight", "places", "scales", "zeros", "perm", "bias")
REQUIRED = ("qweight", "places", "scales")
CHECKED = ("places", "scales", "zeros", "perm", "bias")  # those whose values may be wrong
SPARSITY = "2:4"


@dataclass(frozen=True)
class PackedShape:
    """A layer's sizes, as the config records them: the packed weight is padded and cannot tell."""

    in_features: int
    out_features: int
    group_size: int
    sparse: bool = False


def config_for(modules: Mapping[str, PackedShape]) -> dict[str, Any]:
    """The ``quantization_config`` of a converted checkpoint."""
    sparse = any(shape.sparse for shape in modules.values())
    return {
        "quant_method": "marlin",
        "format_version": SPARSE_VERSION if sparse else DENSE_VERSION,
        "bits": 4,
        "modules": {
            name: {
                "in_features": shape.in_features,
                "out_features": shape.out_features,
                "group_size": shape.group_size,
                **({"sparsity": SPARSITY} if shape.sparse else {}),
            }
            for name, shape in modules.items()
        },
    }


def packed_modules(config: Mapping[str, Any]) -> dict[str, PackedShape]:
    """The modules that a converted checkpoint's ``config.json`` lists.

    Raises :class:`CheckpointError` when it is not a converted checkpoint, is of another version, or
    is malformed.
    """
    inner = config.get("quantization_config")
    method = inner.get("quant_method") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or method != "marlin":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method is {method!r}, not 'marlin': convert "
            "the checkpoint with `marlin convert` first"
        )
    if "format_version" not in inner:
        raise CheckpointError(
            "config.json: quantization_config.quant_method is 'marlin' without a format_version: "
            "this is the packing of the original Marlin kernel, not this package's; convert the "
            "checkpoint with `marlin convert` first"
        )
    problems: list[str] = []
    version = inner.get("format_version")
    if type(version) is not int or version not in (DENSE_VERSION, SPARSE_VERSION):
        problems.append(
            f"config.json: format_version is {version!r}; this version of marlin reads "
            f"{DENSE_VERSION} and {SPARSE_VERSION}: convert the original again, or install the "
            "version that wrote it"
        )
    if inner.get("bits") != 4:
        problems.append(f"config.json: bits is {inner.get('bits')!r}, want 4")
    modules = inner.get("modules")
    if not isinstance(modules, Mapping):
        problems.append(f"config.json: modules is {modules!r}, not an object")
        modules = {}
    found: dict[str, PackedShape] = {}
    for name, entry in modules.items():
        keys = ("in_features", "out_features", "group_size")
        values = [entry.get(key) for key in keys] if isinstance(entry, Mapping) else []
        sizes = [value for value in values if type(value) is int]
        if len(sizes) != 3 or min(sizes[:2]) < 1 or sizes[2] not in GROUP_SIZES:
            problems.append(
                f"config.json: modules[{name!r}] is {entry!r}; want {', '.join(keys)} of a layer"
            )
            continue
        sparsity = entry.get("sparsity")
        if sparsity not in (None, SPARSITY) or (sparsity and version == DENSE_VERSION):
            problems.append(
                f"config.json: modules[{name!r}] has sparsity {sparsity!r}; this version of marlin "
                f"reads {SPARSITY!r}, and that from format_version {SPARSE_VERSION} on; convert "
                "the original again"
            )
        elif sparsity and sizes[0] % QUAD:
            problems.append(
                f"config.json: modules[{name!r}] has sparsity {sparsity!r} and in_features "
                f"{sizes[0]}, which is not a multiple of 4; the file is damaged"
            )
        k, n, group_size = sizes
        found[name] = PackedShape(k, n, group_size, sparsity == SPARSITY)
    if problems:
        raise CheckpointError(problems)
    return found


def check_packed_tensors(checkpoint: Checkpoint, modules: Mapping[str, PackedShape]) -> None:
    """Check that every listed module has its tensors, of the right dtypes and shapes.

    Raises :class:`CheckpointError` with all that is wrong, packed tensors of others included.
    """
    problems: list[str] = []
    for name, shape in modules.items():
        groups = group_count(shape.in_features, shape.group_size)
        scales = checkpoint.tensors.get(f"{name}.scales")
        stored = None if scales is None else scales.torch_dtype
        dtype = stored if stored in COMPUTE_DTYPES else torch.float16
        wanted = operands(shape.in_features, shape.out_features, groups, dtype, sparse=shape.sparse)
        problems += [
            f"{name}: has {leaf}, which a {'2:4 sparse' if shape.sparse else 'dense'} layer, as "
            "config.json says that it is, has not; the file is damaged"
            for leaf in LEAVES
            if leaf not in wanted and f"{name}.{leaf}" in checkpoint.tensors
        ]
        for leaf, (kind, want) in wanted.items():
            info = checkpoint.tensors.get(f"{name}.{leaf}")
            if info is None:
                if leaf in REQUIRED:
                    problems.append(f"{name}: {leaf} is missing")
            elif (info.torch_dtype, info.shape) != (kind, want):
                problems.append(
                    f"{name}: {leaf} is {info.dtype} {list(info.shape)}, want {DTYPE_NAMES[kind]} "
                    f"{list(want)} for {shape}"
                )
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight" and module not in modules:
            problems.append(f"{module}: has a qweight but config.json does not list it")
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)


def check_values(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check what a kernel could not survive or would get wrong, in a layer's tensors by leaf name.

    Those that are not given are not looked at; ``CHECKED`` are those that are.

    Raises :class:`CheckpointError` when ``perm`` does not hold every number 0..K-1 once, a zero
    point is above 15, the places of a sparse layer do not rise, or a scale or bias is not finite.
    """
    problems: list[str] = []
    perm, zeros, places = (tensors.get(leaf) for leaf in ("perm", "zeros", "places"))
    if perm is not None:
        features = torch.arange(perm.numel(), dtype=perm.dtype)
        if not torch.equal(torch.sort(perm).values, features):
            problems.append(f"{name}: perm is not a permutation of 0..{perm.numel() - 1}")
    if zeros is not None and bool((zeros > 15).any()):
        problems.append(f"{name}: zeros holds {int(zeros.max())}, want 0..15")
    falling = "" if places is None else places_problem(places)
    if falling:
        problems.append(f"{name}: {falling}")
    for leaf in ("scales", "bias"):
        if leaf in tensors and not torch.isfinite(tensors[leaf]).all():
            problems.append(f"{name}: {leaf} holds a number that is not finite")
    if problems:
        raise CheckpointError([f"{problem}; the file is damaged" for problem in problems])
