"""The checks of the packed layers: operands, casts, and state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from marlin.formats.packed import COMPUTE_DTYPES, describe, group_size_of, operands
from marlin.formats.sparse import places_problem, quad_problem

if TYPE_CHECKING:
    from marlin._packed_module import PackedModule

OPTIONAL = ("zeros", "perm", "bias")  # each a flag of the constructor
FOREIGN = {
    "weight": "an unquantised layer: load it into nn.Linear, then quantise with replace_linear",
    "qzeros": "a GPTQ or AWQ layer: convert it with `marlin convert`, from_gptq or from_awq",
    "B": "a layer of the original Marlin kernel: convert it with from_original_marlin",
    "weight_packed": "a compressed-tensors layer: convert it with from_compressed_tensors",
}
OF_THE_OTHER_KIND = {
    False: {"places": "a 2:4 sparse layer: load it into MarlinLinear24"},
    True: {"perm": "a layer with act-order, which cannot be sparse: load it into MarlinLinear"},
}


def needed(sparse: bool) -> tuple[str, ...]:
    """The tensors that a layer cannot be without."""
    return ("qweight", "places", "scales") if sparse else ("qweight", "scales")


def check_counts(**counts: int) -> None:
    """Refuse numbers of features that no layer has."""
    for name, count in counts.items():
        if not isinstance(count, SupportsIndex):
            raise TypeError(
                f"{name}: got {count!r}, of type {type(count).__name__}; it must be an int; pass "
                "the number of features"
            )
        if count < 1:
            raise ValueError(
                f"{name}: got {count}; it must be at least 1; use nn.Linear for an empty layer"
            )


def check_operands(
    tensors: Mapping[str, Tensor | None], in_features: int, out_features: int, *, sparse: bool
) -> None:
    """Check packed tensors against each other; see ``from_packed`` of the layers."""
    check_counts(in_features=in_features, out_features=out_features)
    n, k = out_features, in_features
    qweight, scales = tensors["qweight"], tensors["scales"]
    for name in needed(sparse):
        if tensors[name] is None:
            raise TypeError(f"{name}: got None; it must be a tensor; see help(from_packed)")
    problem = quad_problem(k) if sparse else ""
    if problem:
        raise ValueError(problem)
    assert qweight is not None
    assert scales is not None
    if scales.dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"scales: got {describe(scales)}; it must be float16 or bfloat16, the dtype of the "
            "activations; cast it with scales.to(torch.float16)"
        )
    if scales.dim() != 2:
        raise ValueError(f"scales: got {describe(scales)}; it must be [groups, {n}]; reshape it")
    groups = scales.size(0)
    group_size_of(k, groups)
    for name, (dtype, shape) in operands(k, n, groups, scales.dtype, sparse=sparse).items():
        tensor = tensors[name]
        if tensor is None:
            continue
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        rule = f"in_features={k}, out_features={n}, {groups} groups need {wanted}"
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got {describe(tensor)}; {rule}; cast it with .to({dtype})")
        if tensor.shape != shape:
            raise ValueError(f"{name}: got {describe(tensor)}; {rule}; check the feature counts")
        if tensor.device != qweight.device:
            raise ValueError(
                f"{name}: got a tensor on {tensor.device}; qweight is on {qweight.device} and all "
                f"must be on one device; move it with {name}.to({str(qweight.device)!r})"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: got strides {tensor.stride()} for shape {list(shape)}; it must be "
                f"contiguous; pass {name}.contiguous()"
            )
    problem = next(filter(None, (_value_problem(*item) for item in tensors.items())), "")
    if problem:
        raise ValueError(problem)


def _has_values(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return not (tensor is None or tensor.is_meta or isinstance(tensor, FakeTensor))


def _value_problem(name: str, tensor: Tensor | None) -> str:
    """Why values cannot be used: of ``scales``, ``zeros``, ``places``, ``perm`` (out of bounds)."""
    if not _has_values(tensor):
        return ""
    if name == "scales" and not bool(torch.isfinite(tensor).all()):
        return "scales: got NaN or infinity; every scale must be finite; the file is damaged"
    if name == "zeros" and int(tensor.max()) > 15:
        return (
            f"zeros: got {int(tensor.max())}; zero points are 0..15, one per byte; unpack them "
            "before they are passed"
        )
    if name == "places":
        problem = places_problem(tensor)
        return problem and f"{problem}; the file is damaged"
    if name == "perm":
        features = torch.arange(tensor.numel(), device=tensor.device)
        if not torch.equal(tensor.long().sort().values, features):
            return (
                f"perm: got values {int(tensor.min())}..{int(tensor.max())}; it must hold each of "
                f"0..{tensor.numel() - 1} once; pass the order that sorts the features by group, "
                "such as argsort(g_idx, stable=True)"
            )
    return ""


def check_dtypes_kept(
    layer: str, fn: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor | None]
) -> None:
    """Refuse a cast of a layer that its kernels cannot follow, before it is begun.

    ``fn`` is what ``nn.Module._apply`` would call on each buffer; it is tried on empty tensors.
    """
    scales = tensors["scales"]
    assert scales is not None
    dtype = fn(scales.new_empty(0)).dtype
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{layer}: got a cast to {dtype}; scales and activations are torch.float16 or "
            "torch.bfloat16; cast the model with .half() or .bfloat16(), or cast its other "
            "modules one by one"
        )
    integer = fn(scales.new_empty(0, dtype=torch.int32)).dtype
    if integer != torch.int32:
        raise TypeError(
            f"{layer}: got a cast of every buffer to {integer}; qweight holds packed codes in "
            "torch.int32; cast with .to(dtype), which leaves integers as they are"
        )
    for name in ("scales", "bias"):
        problem = _cast_problem(name, tensors[name], dtype)
        if problem:
            raise ValueError(f"{layer}: {problem}")


def _cast_problem(name: str, tensor: Tensor | None, dtype: torch.dtype) -> str:
    """Why ``scales`` or ``bias`` cannot be cast: numbers become 0 or infinity; or nothing."""
    if not _has_values(tensor) or tensor.dtype == dtype:
        return ""
    if name == "scales" and bool(((tensor != 0) & (tensor.to(dtype) == 0)).any()):
        smallest = float(tensor.abs()[tensor != 0].min())
        return (
            f"got a cast to {dtype} with scales down to {smallest:g}, which become 0 in it; keep "
            f"the layer in {tensor.dtype}"
        )
    largest = float(tensor.abs().max())
    if largest > torch.finfo(dtype).max:
        return (
            f"got a cast to {dtype} with {name} up to {largest:g}; its largest number is "
            f"{torch.finfo(dtype).max:g}; keep the layer in {tensor.dtype}"
        )
    return ""


def state_dict_problems(
    layer: PackedModule, state_dict: Mapping[str, Any], prefix: str, assign: bool
) -> list[str]:
    """Why the entries of ``state_dict`` under ``prefix`` do not fit ``layer``."""
    kind = type(layer).__name__
    name = prefix.removesuffix(".") or kind
    foreign = [
        f"{name}: got '{prefix}{key}'; that is {meaning}"
        for key, meaning in (FOREIGN | OF_THE_OTHER_KIND[layer.sparse]).items()
        if prefix + key in state_dict
    ]
    if foreign:
        return foreign
    problems = []
    buffers: Mapping[str, Tensor | None] = layer._buffers
    found = {key: state_dict[prefix + key] for key in buffers if prefix + key in state_dict}
    here, absent = (
        " and ".join(f"'{prefix}{key}'" for key in needed(layer.sparse) if (key in found) is there)
        for there in (True, False)
    )
    if here and absent:
        others = "their scales and places" if layer.sparse else "their scales"
        problems.append(
            f"{name}: got {here} without {absent}; codes mean nothing without {others}; pass the "
            "tensors of a whole layer, or none"
        )
    if "qweight" in found:  # otherwise nothing of the layer, or its bias: torch lists the rest
        for key in (key for key in OPTIONAL if key in buffers):
            stored, built = key in found, buffers[key] is not None
            if stored != built:
                problems.append(
                    f"{name}: got {'a' if stored else 'no'} '{prefix}{key}' in the state dict; the "
                    f"layer was built with{'' if built else 'out'} {key}, and the two must agree; "
                    f"build it with {kind}(..., {key}={stored})"
                )
    for key, value in found.items():
        own = buffers[key]
        if not isinstance(value, Tensor):
            kind_of_value = type(value).__name__
            problems.append(f"{name}.{key}: got a {kind_of_value}; it must be a torch.Tensor")
        elif own is not None:
            problems += _entry_problems(layer, key, own, value, name, assign)
    return problems


def _entry_problems(
    layer: PackedModule, key: str, own: Tensor, value: Tensor, name: str, assign: bool
) -> list[str]:
    if value.shape != own.shape:
        return [
            f"{name}.{key}: got {describe(value)}; the layer (in_features={layer.in_features}, "
            f"out_features={layer.out_features}, group_size={layer.group_size}) holds "
            f"{describe(own)}; build it with the feature counts and group size of the checkpoint"
        ]
    floating = own.is_floating_point() and value.is_floating_point()
    if value.dtype != own.dtype and not (floating and not assign):
        fix = "cast it, or load with assign=False" if floating else "the file is damaged"
        wanted = str(own.dtype).removeprefix("torch.")
        return [f"{name}.{key}: got {describe(value)}; it must be {wanted}; {fix}"]
    problem = _value_problem(key, value)
    if problem:
        return [f"{name}.{problem}"]
    problem = _cast_problem(key, value, own.dtype) if floating else ""
    return [f"{name}.{key}: {problem}"] if problem else []
