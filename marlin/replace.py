"""Replace the linear layers of a model by 4-bit ones, in place, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from marlin._fused_part import FusedPart
from marlin._linear_sources import check_linear
from marlin._replace_report import ReplacedLayer, ReplaceReport, SkippedLayer
from marlin._unlisted_layers import refuse_to_save_unlisted
from marlin.formats.packed import COMPUTE_DTYPES, group_count
from marlin.formats.sparse import QUAD
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.prune import check_method, weights_to_keep

__all__ = ["ReplaceReport", "ReplacedLayer", "SkippedLayer", "replace_linear"]

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class _Kind:
    """What layers are to become: the arguments of :func:`replace_linear` that say so."""

    group_size: int
    symmetric: bool
    dtype: torch.dtype | None
    sparse: bool
    prune: str | None

    def layer_of(self, linear: nn.Linear) -> MarlinLinear | MarlinLinear24:
        size, symmetric, dtype = self.group_size, self.symmetric, self.dtype
        if not self.sparse:
            return MarlinLinear.from_linear(
                linear, group_size=size, symmetric=symmetric, dtype=dtype
            )
        if self.prune is None:
            return MarlinLinear24.from_pruned(
                linear, group_size=size, symmetric=symmetric, dtype=dtype
            )
        return MarlinLinear24.from_linear(
            linear, prune=self.prune, group_size=size, symmetric=symmetric, dtype=dtype
        )


@dataclass
class _Candidate:
    """A linear layer, and every place in the model that holds it: parent, attribute, full name."""

    linear: nn.Linear
    places: list[tuple[nn.Module, str, str]]

    @property
    def name(self) -> str:
        return self.places[0][2]


def replace_linear(
    model: nn.Module,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    skip: str | Iterable[str] = ("lm_head",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    sparse: bool = False,
    prune: str | None = None,
    progress: bool = False,
) -> ReplaceReport:
    """Replace every ``nn.Linear`` inside ``model`` by a ``MarlinLinear``, rounded to nearest.

    With ``sparse``, by a ``MarlinLinear24``: of every four neighbouring weights two are stored.

    One layer at a time: the original is dropped before the next is quantised, so the memory needed
    on top of the model is that of its largest layer. A layer found in several places is quantised
    once and stays shared. Left as they are, with the reason in the report: subclasses of
    ``nn.Linear`` (they may do more), and layers whose weight is tied to another module's or read by
    their parent, which have hooks or a forward of their own, or whose dtype cannot be quantised.

    ``save_pretrained`` of a model of transformers refuses the new layers until
    ``marlin.integrations.transformers.prepare_to_save(model)`` has listed them.

    Args:
        model: any module that contains linear layers; changed in place.
        group_size: input features that share a scale: 32, 64, 128, or -1 for all of them.
        symmetric: zero point 8 everywhere; False fits one per group.
        skip: names to leave: a full name, its last component, or a glob over the full name
            (``"*.mlp.*"``, case-sensitive).
        filter_fn: called with (layer, full name) for what is left; False leaves the layer.
        dtype: of scales, bias and activations; None keeps fp16 or bf16, and takes fp32 to fp16.
            The other modules keep their dtype: cast an fp32 model afterwards (or before) with
            ``model.half()`` or ``model.to(dtype)``, or its activations will not fit.
        device: where to quantise and leave the new layers; None: where the weights are.
        sparse: make 2:4 sparse layers; those whose input features are not a multiple of 4 are left.
        prune: with ``sparse``, which two of every four weights to keep: ``"magnitude"``, the
            largest, which costs quality; None: the weights are 2:4 already, or are refused.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: ``model`` is itself an ``nn.Linear``, or ``dtype`` is neither fp16 nor bf16.
        ValueError: the group size or ``prune`` is not supported, or a weight or bias is not finite,
            exceeds ``dtype``, is not 2:4 though it should be, or not of the layer's sizes: the
            message names the layer. All but values beyond ``dtype`` is found before anything is
            replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(model, nn.Linear):
        raise TypeError(
            f"model: got a {type(model).__name__} itself; a module cannot replace itself in place; "
            "use marlin.MarlinLinear.from_linear(linear)"
        )
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"dtype: got {dtype}; scales and activations are torch.float16 or torch.bfloat16; pass "
            "one of the two, or None to keep the dtype of the weights"
        )
    group_count(1, group_size)  # refuses an unsupported size before anything is replaced
    check_method(prune)
    if prune is not None and not sparse:
        raise ValueError(
            f"prune: got {prune!r} with sparse=False; pruned weights are for sparse layers; pass "
            "sparse=True, too, or prune=None"
        )
    kind = _Kind(group_size, symmetric, dtype, sparse, prune)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"skip: got {skip!r}; it must be a name or several; pass () for none")
    report = ReplaceReport()
    chosen = _choose(model, patterns, filter_fn, sparse, report)
    for candidate in chosen:
        _check(candidate, check_linear)
        _check_finite(candidate)
        if sparse and prune is None and not candidate.linear.weight.is_meta:
            _check(candidate, lambda linear: weights_to_keep(linear.weight, None))
    with tqdm(total=len(chosen), unit="layer", disable=not progress) as bar:
        while chosen:  # the last reference to a layer goes with it
            candidate = chosen.pop(0)
            bar.set_description(candidate.name)
            report.replaced.append(_replace(candidate, kind, device))
            bar.update()
    refuse_to_save_unlisted(model)
    return report


def _choose(
    model: nn.Module,
    patterns: tuple[str, ...],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    sparse: bool,
    report: ReplaceReport,
) -> list[_Candidate]:
    """The layers to replace; the others are entered in ``report``."""
    chosen = []
    owners = _weight_owners(model)
    for candidate in _linear_layers(model):
        reason = _reason_to_skip(candidate, patterns, owners)
        if not reason and sparse:
            reason = _reason_against_sparsity(candidate.linear)
        if not reason and filter_fn is not None and not filter_fn(candidate.linear, candidate.name):
            reason = "filter_fn"
        if reason:
            report.skipped.append(SkippedLayer(candidate.name, reason))
        else:
            chosen.append(candidate)
    return chosen


def _replace(
    candidate: _Candidate, kind: _Kind, device: torch.device | str | int | None
) -> ReplacedLayer:
    linear, name = candidate.linear, candidate.name
    before = sum(_bytes(parameter) for parameter in linear.parameters())
    try:
        layer = kind.layer_of(linear if device is None else _copy_to(linear, device))
    except ValueError as error:  # its message starts with the argument: "weight: got ..."
        raise ValueError(f"{name}.{error}") from error
    for parent, attribute, _ in candidate.places:
        setattr(parent, attribute, layer)
    after = sum(_bytes(buffer) for buffer in layer.buffers())
    dtypes = [str(t.dtype).removeprefix("torch.") for t in (linear.weight, layer.scales)]
    return ReplacedLayer(name, (layer.out_features, layer.in_features), before, after, *dtypes)


def _copy_to(linear: nn.Linear, device: torch.device | str | int) -> nn.Linear:
    """``linear`` on ``device``, the original left where it is in case it cannot be quantised."""
    moved = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    if linear.weight.is_meta:
        device = "meta"
    moved.weight = nn.Parameter(linear.weight.detach().to(device), requires_grad=False)
    if linear.bias is not None:
        moved.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return moved.train(linear.training)


def _linear_layers(model: nn.Module) -> list[_Candidate]:
    """Every linear layer below ``model``, once each."""
    found: dict[int, _Candidate] = {}
    for path, parent in model.named_modules():  # each parent once, so each place once
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                name = f"{path}.{attribute}" if path else attribute
                candidate = found.setdefault(id(child), _Candidate(child, []))
                candidate.places.append((parent, attribute, name))
    return list(found.values())


def _weight_owners(model: nn.Module) -> dict[Any, list[tuple[nn.Module, str]]]:
    """For each parameter in memory, the modules that hold it, with their names."""
    owners: dict[Any, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append((module, path))
    return owners


def _identity(parameter: Tensor) -> Any:
    """Equal for parameters that are one tensor in memory, even as two objects."""
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout == torch.strided
    if not plain or parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride())


def _reason_to_skip(
    candidate: _Candidate,
    patterns: tuple[str, ...],
    owners: dict[Any, list[tuple[nn.Module, str]]],
) -> str:
    """Why a layer must stay as it is; empty if it need not."""
    linear = candidate.linear
    for pattern in patterns:
        if any(matches(name, pattern) for _, _, name in candidate.places):
            return f"skip={pattern!r}"
    reason = reason_to_keep(linear, [parent for parent, _, _ in candidate.places])
    if reason:
        return reason
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(linear.weight).__name__}, not a plain tensor"
    tied = [path for module, path in owners[_identity(linear.weight)] if module is not linear]
    if tied:
        return f"its weight is tied to that of {', '.join(path or 'the model' for path in tied)}"
    if not linear.weight.is_floating_point() or linear.weight.element_size() < 2:
        return f"its weight is {linear.weight.dtype}, not a float of 16 bits or more"
    if linear.weight.numel() == 0:
        return "its weight is empty"
    return ""


def _reason_against_sparsity(linear: nn.Linear) -> str:
    if linear.in_features % QUAD == 0:
        return ""
    return f"its {linear.in_features} input features are not a multiple of 4, as sparse=True needs"


def reason_to_keep(layer: nn.Module, parents: Iterable[nn.Module]) -> str:
    """Why a layer does more than its weight says, so that another cannot stand in; or empty."""
    if "parametrizations" in layer._modules:
        return "its weight is parametrized; make it permanent with remove_parametrizations"
    if isinstance(layer, FusedPart):
        return "it is fused with others, which marlin.unfuse(model) undoes"
    if type(layer) not in (nn.Linear, MarlinLinear, MarlinLinear24):
        kind = "a subclass of nn.Linear" if isinstance(layer, nn.Linear) else "not an nn.Linear"
        return f"{type(layer).__name__} is {kind} and may do more than it"
    reason = reason_of_instance(layer)
    if reason:
        return reason
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
        return "nn.TransformerEncoderLayer reads its weight in its fast path"
    return ""


def reason_of_instance(layer: nn.Module) -> str:
    """Why a layer does more than others of its class, so that no new one can stand in; or empty."""
    hooks = [hook for hook in HOOKS if getattr(layer, hook, None)]
    if hooks:
        return f"it has hooks ({', '.join(hooks)}), which the new layer would not run"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (as accelerate does)"
    return ""


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a layer: its full name, the last part of it, or a glob over it."""
    return pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern)


def _check(candidate: _Candidate, check: Callable[[nn.Linear], object]) -> None:
    """Run a check whose errors start with the argument: "weight: got ..."."""
    try:
        check(candidate.linear)
    except ValueError as error:
        raise ValueError(
            f"{candidate.name}.{error}, or leave this layer with skip=({candidate.name!r},); "
            "nothing has been replaced"
        ) from error


def _check_finite(candidate: _Candidate) -> None:
    for name, parameter in candidate.linear.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"{candidate.name}.{name}: got NaN or infinity; every weight must be finite, and "
                "nothing has been replaced; repair the checkpoint, or leave this layer with "
                f"skip=({candidate.name!r},)"
            )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
