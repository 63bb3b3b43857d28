"""Load a checkpoint written by ``marlin convert`` into any model whose module names it uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from marlin._computed_buffers import rebuild_computed_buffers
from marlin._unlisted_layers import refuse_to_save_unlisted
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.container import TensorInfo
from marlin.formats.native import (
    CHECKED,
    LEAVES,
    PackedShape,
    check_packed_tensors,
    check_values,
    packed_modules,
)
from marlin.fuse import fuse as fuse_layers
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.replace import reason_to_keep

ModelT = TypeVar("ModelT", bound=nn.Module)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _device_of(module: nn.Module, wanted: torch.device | None) -> torch.device:
    """Where a module's tensors go: as asked, else where they are; from meta, to the CPU."""
    if wanted is not None:
        return wanted
    here = next((t.device for t in (*module.parameters(False), *module.buffers(False))), None)
    return here if here is not None and here.type != "meta" else torch.device("cpu")


def _child(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def module_problem(model: nn.Module, name: str, shape: PackedShape, has_bias: bool) -> str | None:
    """Why a listed module of the model cannot be replaced, or None."""
    module = _child(model, name)
    if module is None:
        return f"{name}: the checkpoint has this layer, the model has no module of this name"
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if sizes == (None, None):
        return f"{name}: the model has a {type(module).__name__} here, want a linear layer"
    reason = reason_to_keep(module, [model.get_submodule(name.rpartition(".")[0])])
    if reason:
        return f"{name}: the model's layer cannot be replaced: {reason}; load a plain model"
    if sizes != (shape.in_features, shape.out_features):
        return (
            f"{name}: the model's layer is {sizes[0]} -> {sizes[1]} features, the checkpoint's "
            f"{shape.in_features} -> {shape.out_features}"
        )
    if getattr(module, "bias", None) is not None and not has_bias:
        return f"{name}: the model's layer has a bias, the checkpoint has none for it"
    return None


def _read_leaves(checkpoint: Checkpoint, name: str, leaves: Iterable[str]) -> dict[str, Tensor]:
    """Those that the checkpoint has of a layer's tensors."""
    full = {leaf: f"{name}.{leaf}" for leaf in leaves}
    return {leaf: checkpoint.read(f) for leaf, f in full.items() if f in checkpoint.tensors}


def packed_layer(
    checkpoint: Checkpoint, name: str, shape: PackedShape, device: torch.device
) -> nn.Module:
    """A layer of the checkpoint, whole, on ``device``; :func:`check_layer` comes first."""
    tensors = _read_leaves(checkpoint, name, LEAVES)
    sizes = {"in_features": shape.in_features, "out_features": shape.out_features}
    kind: Any = MarlinLinear24 if shape.sparse else MarlinLinear
    layer: nn.Module = kind.from_packed(**tensors, **sizes)
    return layer.to(device)


def check_layer(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a layer of the checkpoint whose values cannot be right; its qweight is not read."""
    check_values(name, _read_leaves(checkpoint, name, CHECKED))


def _assign(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Put ``value`` in place of a module's parameter or buffer of that name."""
    if leaf in module._parameters:
        old = module._parameters[leaf]
        trainable = old is not None and old.requires_grad and value.is_floating_point()
        module._parameters[leaf] = nn.Parameter(value, requires_grad=trainable)
    else:
        module._buffers[leaf] = value


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every tensor that the model's state dict holds: its name -> (module, attribute)."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found[start + leaf] = (module, leaf)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[start + leaf] = (module, leaf)
    return found


def _below_packed(
    places: Iterable[str], tensors: Iterable[str], modules: Iterable[str]
) -> list[str]:
    """Tensors of layers that are replaced, in the model or the checkpoint, that have no place."""
    replaced = tuple(f"{name}." for name in modules)
    known = {f"{start}{leaf}" for start in replaced for leaf in (*LEAVES, "weight")}
    return [
        f"{name}: the {where} holds this below a layer that is replaced, and a packed layer has "
        f"only {', '.join(LEAVES)}"
        for where, names in (("model", places), ("checkpoint", tensors))
        for name in names
        if name.startswith(replaced) and name not in known
    ]


def _ignored(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Tensors of the checkpoint that the model computes itself, or says that it does not need.

    The latter by ``_keys_to_ignore_on_load_unexpected``, regular expressions as in transformers.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules(remove_duplicate=False)
        for leaf in module._non_persistent_buffers_set
    }
    return {name for name in names if name in computed or any(re.search(p, name) for p in patterns)}


def _value(place: tuple[nn.Module, str]) -> Tensor:
    module, leaf = place
    value: Tensor = getattr(module, leaf)
    return value


def _tied_groups(places: dict[str, tuple[nn.Module, str]]) -> list[list[str]]:
    """Names that stand for one and the same tensor, grouped."""
    groups: dict[int, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(id(_value(place)), []).append(name)
    return list(groups.values())


def _load_group(
    checkpoint: Checkpoint,
    names: list[str],
    places: dict[str, tuple[nn.Module, str]],
    device: torch.device | None,
) -> None:
    value = checkpoint.read(next(name for name in names if name in checkpoint.tensors))
    module, leaf = places[names[0]]
    _assign(module, leaf, value.to(_device_of(module, device)))
    shared = _value((module, leaf))
    for name in names[1:]:
        module, leaf = places[name]
        tensors: dict[str, Any] = module.__dict__["_parameters"]
        (tensors if leaf in tensors else module._buffers)[leaf] = shared


def _compare_tied(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Tensors that the model ties, of which the checkpoint holds different ones."""
    first, *others = (name for name in names if name in checkpoint.tensors)
    if not others:
        return []
    value = checkpoint.read(first).flatten().view(torch.uint8)
    return [
        f"the model ties {first} to {other} but the checkpoint holds different values: build the "
        "model untied"
        for other in others
        if not torch.equal(checkpoint.read(other).flatten().view(torch.uint8), value)
    ]


def _kind_problem(info: TensorInfo, own: Tensor) -> str:
    """Why a tensor of the checkpoint cannot stand in for one of the model's, or nothing."""
    found = info.torch_dtype
    known = found is not None and (
        found == own.dtype
        or (found in FLOATS if own.is_floating_point() else not found.is_floating_point)
    )
    wanted = str(own.dtype).removeprefix("torch.")
    if known:
        return ""
    return (
        f"{info.name}: the checkpoint holds {info.dtype}, the model {wanted}: want "
        f"{'a float of 16 bits or more' if own.is_floating_point() else 'an integer'}; build the "
        "model that was saved, or convert again"
    )


def _compare_names(
    places: dict[str, tuple[nn.Module, str]], groups: list[list[str]], tensors: Iterable[str]
) -> list[str]:
    available = set(tensors)
    problems = [
        f"{group[0]}: the checkpoint has no such tensor"
        for group in groups
        if not any(name in available for name in group)
    ]
    problems += [
        f"{name}: the model has no such parameter" for name in available if name not in places
    ]
    return sorted(problems)


def load(
    model: ModelT,
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    fuse: bool = False,
) -> ModelT:
    """Load a converted checkpoint into ``model``, in place, and return it.

    Every module that ``quantization_config["modules"]`` lists is replaced by a ``MarlinLinear``, or
    by a ``MarlinLinear24`` where its weight is stored 2:4 sparse; every other parameter and
    persistent buffer takes the checkpoint's tensor and its dtype, a float for a float. The model
    may be on any device, meta included: ``device`` says where its tensors go, None keeps each where
    it is (the CPU for meta). Names that share one tensor stay tied. The match is strict. With
    ``fuse``, layers that read the same input become one GEMM afterwards: :func:`marlin.fuse`, which
    also says which.

    Only plain ``nn.Linear`` layers are replaced: not subclasses, nor layers with hooks,
    parametrizations or a forward of their own. Tensors of the checkpoint that are non-persistent
    buffers of the model, or that its ``_keys_to_ignore_on_load_unexpected`` names, are left out.

    Raises :class:`~marlin.formats.checkpoint.CheckpointError` naming every module and tensor that
    is missing, unexpected, damaged, or of another shape or kind of dtype, before the model is
    changed.
    """
    fill(model, directory, device, packed_layer, check_layer)
    if fuse:
        fuse_layers(model)
    return model


def fill(
    model: ModelT,
    directory: str | Path,
    device: torch.device | str | None,
    read_layer: Callable[[Checkpoint, str, PackedShape, torch.device], nn.Module],
    check_layer: Callable[[Checkpoint, str], None],
) -> ModelT:
    """What :func:`load` does, with other layers, as ``read_layer`` makes them, in place of its.

    ``check_layer`` refuses those whose values cannot be right, before the model is changed.
    """
    checkpoint = Checkpoint.open(directory)
    modules = packed_modules(checkpoint.config)
    check_packed_tensors(checkpoint, modules)
    wanted = None if device is None else torch.device(device)
    problems = [
        problem
        for name, shape in modules.items()
        if (problem := module_problem(model, name, shape, f"{name}.bias" in checkpoint.tensors))
    ]
    packed = {f"{name}.{leaf}" for name in modules for leaf in LEAVES}
    places = _places(model)
    replaced = tuple(f"{name}." for name in modules)
    kept = {name: place for name, place in places.items() if not name.startswith(replaced)}
    groups = _tied_groups(kept)
    others = [name for name in checkpoint.tensors if name not in packed]
    problems += _below_packed(places, others, modules)
    ignored = _ignored(model, others) - kept.keys()
    problems += _compare_names(
        kept,
        groups,
        [name for name in others if name not in ignored and not name.startswith(replaced)],
    )
    for name, place in kept.items():
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != tuple(_value(place).shape):
            problems.append(
                f"{name}: the checkpoint's shape is {list(info.shape)}, the model's "
                f"{list(_value(place).shape)}"
            )
        elif info is not None and (problem := _kind_problem(info, _value(place))):
            problems.append(problem)
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)
    # Then what only values say. They are read once more below; the qweights, most of it, are not.
    for group in groups:
        problems += _compare_tied(checkpoint, group)
    for name in modules:
        try:
            check_layer(checkpoint, name)
        except CheckpointError as error:
            problems += error.refusals
    if problems:
        raise CheckpointError(problems, where=checkpoint.directory)

    for group in groups:
        _load_group(checkpoint, group, kept, wanted)
    for name, shape in modules.items():
        old = model.get_submodule(name)
        layer = read_layer(checkpoint, name, shape, _device_of(old, wanted))
        layer.train(old.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    refuse_to_save_unlisted(model)
    stuck = rebuild_computed_buffers(model)
    if stuck:
        names = ", ".join(f"{name} ({reason})" for name, reason in stuck.items())
        raise CheckpointError(
            f"no values for the buffers {names}: they are computed when the model is built, which "
            "the meta device skips; build the model with only its parameters on meta, or on the "
            "CPU",
            where=checkpoint.directory,
        )
    if wanted is not None:
        model.to(wanted)
    return model
