"""``FusedLinear``: several packed layers on one input, as one GEMM; and its parts, under old names.

A part computes ``y = x W^T`` for all of its siblings and returns its slice: that is right whatever
is called, in any order, any number of times, and it is the same bits every time. What makes it one
GEMM is that the first part hands the other slices over, and they are taken only where they cannot
be stale:

- within one ``forward`` of the module that owns the parts, in one thread (hooks open and close it),
  after the part that it calls first;
- by a part that is given the very same tensor, unwritten by its ``_version`` where it has one;
- in modules whose source was read (:mod:`marlin._call_runs`): each part is called in one place, and
  nothing between the calls writes the tensor, or changes stream, grad mode or autocast. That is
  needed where a version does not exist (inference mode) or cannot be compared (``torch.compile``).

In a compiled graph the handing over happens while Dynamo traces, and leaves one GEMM and no state.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from marlin._fused_part import FusedPart
from marlin._packed_linear import PackedLinear
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.replace import HOOKS, reason_to_keep

BLOCK = 64  # output features: qweight and places are stored in blocks of as many rows
BY_BLOCK = ("qweight", "places")
BY_COLUMN = ("scales", "zeros")


def reason_not_to_fuse(layer: nn.Module) -> str:
    """Why a layer cannot be fused with any other; empty if it can."""
    if type(layer) not in (MarlinLinear, MarlinLinear24):
        return f"{type(layer).__name__} is not a MarlinLinear or MarlinLinear24"
    if cast(PackedLinear, layer).qweight.is_meta:
        return "its tensors are on the meta device; load them first"
    return reason_to_keep(layer, [])


def difference(layer: PackedLinear, other: PackedLinear, name: str) -> str:
    """Why one GEMM cannot be that of a layer and of ``other``, called ``name``, too; or empty."""
    settings, wanted = _settings(layer), _settings(other)
    for key, mine in settings.items():
        if mine != wanted[key]:
            return f"its {key} is {mine}, that of {name} is {wanted[key]}"
    order, other_order = layer._buffers.get("perm"), other._buffers.get("perm")
    if order is not None and other_order is not None and not torch.equal(order, other_order):
        return f"its act-order (perm) is not that of {name}"
    return ""


def _settings(layer: PackedLinear) -> dict[str, Any]:
    return {
        "kind": type(layer).__name__,
        "in_features": layer.in_features,
        "group_size": layer.group_size,
        "dtype": layer.scales.dtype,
        "device": layer.scales.device,
        "symmetry": "symmetric" if layer.zeros is None else "asymmetric",
        "act_order": layer._buffers.get("perm") is not None,
        "static_weights": layer.static_weights,
    }


def ends_inside_block(layer: PackedLinear) -> bool:
    """Whether rows of padding follow the layer's, so that no other can follow in one qweight."""
    return layer.out_features % BLOCK != 0


class FusedLinear(nn.Module):
    """Several packed layers that read one input, multiplied as one.

    ``input`` ``[..., in_features]`` gives a tuple of ``[..., out_features]``, one for each layer,
    in their order. They are slices of one tensor, not contiguous where there are several rows. A
    layer without a bias beside one that has it gets zeros.

    :func:`marlin.fuse` puts it into models whose code stays as it is. In code of your own::

        self.qkv = FusedLinear([q, k, v])
        q, k, v = self.qkv(x)

    On a GPU the sums may be split elsewhere than those of the single layers, which moves a result
    by its rounding; gradients of the input are summed in another order.

    Attributes:
        packed: the ``MarlinLinear`` or ``MarlinLinear24`` of all output features.
        sizes: ``out_features`` of each layer.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        """Copy ``layers``, ``MarlinLinear`` or ``MarlinLinear24``, into one.

        Raises:
            ValueError: there are none, they differ in more than output features and bias, or the
                output features of more than one are not a multiple of 64.
        """
        super().__init__()
        if not layers:
            raise ValueError("layers: got none; pass at least one MarlinLinear or MarlinLinear24")
        for index, layer in enumerate(layers):
            reason = reason_not_to_fuse(layer) or difference(layer, layers[0], "layers[0]")
            if reason:
                raise ValueError(
                    f"layers[{index}]: {reason}; layers are fused that differ in output features "
                    "and bias only; leave it out"
                )
        partial = [index for index, layer in enumerate(layers) if ends_inside_block(layer)]
        if len(partial) > 1:
            raise ValueError(
                f"layers: got {[layer.out_features for layer in layers]} output features; all but "
                f"one must be a multiple of {BLOCK}, a block of the packed format; leave out "
                f"layers[{partial[-1]}]"
            )
        self.sizes = tuple(layer.out_features for layer in layers)
        self._biased = tuple(layer.bias is not None for layer in layers)
        order = sorted(range(len(layers)), key=lambda index: index in partial)
        ends = accumulate(self.sizes[index] for index in order)
        starts = {index: end - self.sizes[index] for index, end in zip(order, ends, strict=True)}
        self._starts = tuple(starts[index] for index in range(len(layers)))
        self.packed = _concatenate([layers[index] for index in order])
        self.names: tuple[str, ...] = ()
        self._name = ""
        self._slot = _Slot()

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """``input`` ``[..., in_features]`` -> ``[..., out_features]`` of each layer.

        Raises:
            RuntimeError: the input has another number of features, dtype or device.
        """
        output = self.packed(input)
        # Not split(), whose results autograd does not let the model write in place.
        return tuple(
            output.narrow(-1, start, size)
            for start, size in zip(self._starts, self.sizes, strict=True)
        )

    def part(self, index: int, input: Tensor) -> Tensor:
        """The output of one layer: handed over by a sibling, or computed with theirs."""
        slot = self._slot
        if slot.input is input and index in slot.parts and slot.version == _version(input):
            return slot.parts.pop(index)
        parts: dict[int, Tensor] = dict(enumerate(self(input)))
        output = parts.pop(index)
        if slot.open and index == 0:
            slot.input, slot.version, slot.parts = input, _version(input), parts
        return output

    def attach(self, parent: nn.Module, names: Sequence[str]) -> None:
        """Put parts in place of the modules in ``parent`` that this was made from.

        ``names``: children, or ``child.layer`` of a child that passes its input on to it. They must
        be of one run of the ``forward``, in that order: see :mod:`marlin._call_runs`.
        """
        children = [name.partition(".")[0] for name in names]
        self.names, self._name = tuple(names), f"fused_{'_'.join(children)}"
        while hasattr(parent, self._name):
            self._name += "_"
        # The parts save and load the tensors, under the old names.
        self.packed._non_persistent_buffers_set.update(self.packed._buffers)
        parent.register_forward_pre_hook(self._open)
        parent.register_forward_hook(self._close, always_call=True)
        parent.add_module(self._name, self)
        for index, name in enumerate(names):
            _put(parent, name, FusedPart(self, index))

    def detach_problem(self, parent: nn.Module) -> str:
        """Why :meth:`detach` would lose something, or nothing."""
        for name in self.names:
            child = _find(parent, name)
            if not isinstance(child, FusedPart) or child._fused[0] is not self:
                return f"{name} is a {type(child).__name__} now, not the FusedPart that it was"
            if any(getattr(child, hook, None) for hook in HOOKS):
                return f"{name} has hooks, which its own layer would not run"
        return ""

    def detach(self, parent: nn.Module) -> None:
        """Undo :meth:`attach`: layers of their own, with copies of the tensors."""
        # Not by their handles: these break when a part is copied whose parent is gone.
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
        for index, name in enumerate(self.names):
            _put(parent, name, self.layer(index))
        delattr(parent, self._name)

    def tensors(self, index: int) -> dict[str, Tensor | None]:
        """The tensors of one layer, as views: scales and zeros are strided."""
        start, size = self._starts[index], self.sizes[index]
        first, blocks = start // BLOCK, -(-size // BLOCK)
        found: dict[str, Tensor | None] = {}
        for name, tensor in self.packed._buffers.items():
            if tensor is None or (name == "bias" and not self._biased[index]):
                found[name] = None
            elif name in BY_BLOCK:
                found[name] = tensor.narrow(0, first, blocks)
            elif name in BY_COLUMN:
                found[name] = tensor.narrow(1, start, size)
            else:
                found[name] = tensor if name == "perm" else tensor.narrow(0, start, size)
        return found

    def layer(self, index: int, *, copy: bool = True) -> PackedLinear:
        """One layer alone; without ``copy`` its codes and bias are views."""
        tensors = {
            # Of no tensor with a stride, and of none that siblings have, too, can a view be saved.
            name: tensor.clone(memory_format=torch.contiguous_format)
            if tensor is not None and (copy or name in ("perm", *BY_COLUMN))
            else tensor
            for name, tensor in self.tensors(index).items()
        }
        return _layer_like(self.packed, self.sizes[index], tensors)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows beside the name."""
        return ", ".join(self.names) or f"sizes={self.sizes}"

    def _open(self, module: nn.Module, args: Any) -> None:
        self._slot.reset(open=True)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self._slot.reset(open=False)


class _Slot(threading.local):
    """The slices that wait to be taken, in one thread. A copy or a pickle has none."""

    def __init__(self) -> None:  # called in each thread that comes here
        self.reset(open=False)

    def reset(self, *, open: bool) -> None:
        self.open = open
        self.input: Tensor | None = None
        self.version: int | None = None
        self.parts: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type[_Slot], tuple[()]]:
        return _Slot, ()


def _version(tensor: Tensor) -> int | None:
    """None where there is none, or where Dynamo makes it a number that is not known yet."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _find(parent: nn.Module, name: str) -> nn.Module | None:
    """The module of this dotted name in ``parent``, or None."""
    try:
        return parent.get_submodule(name)
    except AttributeError:
        return None


def _put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``parent`` has another, by its dotted name."""
    path, _, leaf = name.rpartition(".")
    setattr(parent.get_submodule(path), leaf, module)


def _concatenate(layers: list[PackedLinear]) -> PackedLinear:
    biased = any(layer.bias is not None for layer in layers)
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in layers[0]._buffers.items():
        if name == "bias":
            parts = [_bias(layer) for layer in layers] if biased else None
        elif tensor is None or name == "perm":
            tensors[name] = tensor
            continue
        else:
            parts = [cast(Tensor, layer._buffers[name]) for layer in layers]
        tensors[name] = None if parts is None else torch.cat(parts, 1 if name in BY_COLUMN else 0)
    return _layer_like(layers[0], sum(layer.out_features for layer in layers), tensors)


def _bias(layer: PackedLinear) -> Tensor:
    if layer.bias is not None:
        return layer.bias
    return layer.scales.new_zeros(layer.out_features)


def _layer_like(
    model: PackedLinear, out_features: int, tensors: dict[str, Tensor | None]
) -> PackedLinear:
    """A layer of ``model``'s kind and settings around other tensors."""
    layer = type(model)._empty(model.in_features, out_features, dtype=model.scales.dtype)
    layer.group_size = model.group_size
    layer.static_weights = model.static_weights
    layer._set_buffers(**tensors)
    return layer.train(model.training)
