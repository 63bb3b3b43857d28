"""Empty packed layers in a model whose tensors another loader will fill, and the checks before.

A loader of another library copies tensors by name and checks little. So everything that
``marlin.load`` would refuse is looked for beforehand, in the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin._linear_checks import check_dtypes_kept
from marlin._packed_module import PackedModule
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import TensorInfo, read_header
from marlin.formats.native import (
    PackedShape,
    check_packed_tensors,
    check_values,
    packed_modules,
)
from marlin.formats.packed import group_count, operands
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.load import module_problem

CHECKED_LEAVES = ("places", "scales", "zeros", "perm", "bias")  # codes may be anything


def open_files(files: Iterable[str | Path], quantization_config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that consists of these safetensors files; only headers are read.

    Raises:
        CheckpointError: a file is not safetensors or is damaged, or two hold the same tensor.
    """
    paths = [Path(file) for file in files]
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            problems.append(f"{path.name} is not a .safetensors file; save it as one first")
            continue
        try:
            header, _ = read_header(path)
        except CheckpointError as error:
            problems += error.refusals
            continue
        problems += [
            f"tensor {name!r} is in both {tensors[name].path.name} and {path.name}"
            for name in header
            if name in tensors
        ]
        tensors |= header
    directory = paths[0].parent if paths else Path()
    if problems:
        raise CheckpointError(problems, where=directory)
    config = {"quantization_config": dict(quantization_config)}
    return Checkpoint(directory, config, None, tensors, [path.name for path in paths])


def check_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, PackedShape]:
    """The listed modules, once their tensors are known to be good for a model in ``dtype``.

    Of each layer all but the codes is read, one layer at a time. Scales and biases stored in the
    other 16-bit dtype will be cast: a warning says so where that rounds scales.

    Raises:
        CheckpointError: a tensor is missing, of another dtype or shape, unlisted or damaged.
        ValueError: ``dtype`` cannot hold the scales or biases of a layer.
    """
    modules = packed_modules(checkpoint.config)
    check_packed_tensors(checkpoint, modules)
    problems: list[str] = []
    rounded: list[str] = []
    for name in modules:
        tensors = {
            leaf: checkpoint.read(f"{name}.{leaf}")
            for leaf in CHECKED_LEAVES
            if f"{name}.{leaf}" in checkpoint.tensors
        }
        try:
            check_values(name, tensors)
        except CheckpointError as error:
            problems += error.refusals
            continue
        if cast_rounds(name, tensors["scales"], tensors.get("bias"), dtype):
            rounded.append(name)
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    if rounded:
        own = checkpoint.tensors[f"{rounded[0]}.scales"].torch_dtype
        warn_of_rounding(rounded, own, dtype)
    return modules


def cast_rounds(name: str, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a cast to ``dtype`` changes the scales of a layer.

    Raises:
        ValueError: ``dtype`` cannot hold the scales or the bias.
    """
    if scales.dtype == dtype:
        return False

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    check_dtypes_kept(name, cast, {"scales": scales, "bias": bias})
    return not torch.equal(cast(scales).float(), scales.float())


def warn_of_rounding(names: list[str], own: torch.dtype | None, dtype: torch.dtype) -> None:
    """Say that the scales of these layers, stored in the dtype ``own``, lose bits."""
    warnings.warn(
        f"the scales of {len(names)} layers ({names[0]}, ...) are {own} in the checkpoint "
        f"and are rounded to {dtype}, the model's dtype: pass dtype={own} to keep them",
        stacklevel=2,
    )


def names_in_model(model: nn.Module, modules: Iterable[str], prefix: str) -> dict[str, str]:
    """Where the model has each listed module: listed name -> name in the model.

    A model without its head, or with one around it, lacks or has ``prefix`` before every name.
    A module found nowhere keeps its name.
    """
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}
    start = f"{prefix}." if prefix else ""
    found = {}
    for name in modules:
        choices = (name, name.removeprefix(start), start + name)
        found[name] = next((choice for choice in choices if choice in own), name)
    return found


def place_empty_layers(
    model: nn.Module,
    checkpoint: Checkpoint,
    modules: Mapping[str, PackedShape],
    names: Mapping[str, str],
    make: Callable[[str], nn.Module],
) -> None:
    """Put ``make(name)`` in place of each listed module.

    ``names`` say where (see :func:`names_in_model`).

    Raises:
        CheckpointError: the model lacks a module, has one that cannot be replaced, or ties its
            weight to another; the model is unchanged.
    """
    problems: list[str] = []
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties.keys(), *ties.values()}
    for name, shape in modules.items():
        problem = module_problem(model, names[name], shape, f"{name}.bias" in checkpoint.tensors)
        if problem is None and f"{names[name]}.weight" in tied:
            problem = (
                f"{names[name]}: the model ties this layer's weight to another and the checkpoint "
                "has it in 4 bits: set tie_word_embeddings to false in config.json"
            )
        if problem is not None:
            problems.append(problem)
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    for name in modules:
        replace_module(model, names[name], make(name))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the model has the module ``name``."""
    new.train(model.get_submodule(name).training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def empty_layer(
    checkpoint: Checkpoint, name: str, shape: PackedShape, dtype: torch.dtype
) -> nn.Module:
    """A packed layer on the meta device with the tensors that the checkpoint has for it."""
    optional = ("zeros", "bias") if shape.sparse else ("zeros", "bias", "perm")
    kind: Any = MarlinLinear24 if shape.sparse else MarlinLinear
    layer: nn.Module = kind(
        shape.in_features,
        shape.out_features,
        group_size=shape.group_size,
        device="meta",
        dtype=dtype,
        **{leaf: f"{name}.{leaf}" in checkpoint.tensors for leaf in optional},
    )
    return layer


def finish_layers(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Check what a loader has put into the layers, and make it fit for the kernels.

    Tensors that are still on the meta device, offloaded, are left as they are.

    Raises:
        CheckpointError: a tensor has not the dtype or shape that its layer was built for.
    """
    problems: list[str] = []
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedModule)
        if layer.scales.is_meta:
            layer.static_weights = False  # its tensors are made anew for every call
        elif layer.scales.dtype != dtype:
            layer.to(dtype)  # transformers casts since some version after 5.0
        layer.adopt_buffers()
        problems += _buffer_problems(name, layer, dtype)
    if problems:
        raise CheckpointError(problems)


def _buffer_problems(name: str, layer: PackedModule, dtype: torch.dtype) -> list[str]:
    k, n = layer.in_features, layer.out_features
    wanted = operands(k, n, group_count(k, layer.group_size), dtype, sparse=layer.sparse)
    found: dict[str, Tensor | None] = layer._buffers
    return [
        f"{name}.{leaf}: the loader made {tensor.dtype} {list(tensor.shape)} of it, want "
        f"{wanted[leaf][0]} {list(wanted[leaf][1])}"
        for leaf, tensor in found.items()
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != wanted[leaf]
    ]
