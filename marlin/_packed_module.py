"""The base of layers with packed weights: how they are copied, cast, loaded and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from marlin._inductor import kernels_leave_waits_out
from marlin._linear_checks import check_dtypes_kept, state_dict_problems
from marlin._weight_watch import WeightWatch
from marlin.formats.packed import aligned

Module = TypeVar("Module", bound="PackedModule")


class PackedModule(nn.Module):
    """A layer whose weight is a set of buffers, some of which may be None.

    Attributes:
        sparse: whether of every four neighbouring input features two are stored, in ``places``.
        static_weights: described in :class:`marlin.MarlinLinear`.
    """

    sparse: ClassVar[bool]
    in_features: int
    out_features: int
    group_size: int
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    static_weights: bool | None = None

    def _set_buffers(self, **tensors: Tensor | None) -> None:
        # Absent ones last: torch.export (2.11) numbers the buffers of a root module without looking
        # whether they are None, and fails on a tensor that comes after a None. A name that is there
        # already would keep its place.
        for name in tensors:
            self._buffers.pop(name, None)
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self._watch = WeightWatch()

    def _weights_are_static(self) -> bool:
        """Whether no kernel in flight can be writing the weights: see ``static_weights``."""
        if torch.compiler.is_compiling():
            return bool(self.static_weights) and not kernels_leave_waits_out()
        if self.static_weights is not None:
            return self.static_weights
        return self._watch.unchanged(self._buffers.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of the dense matrix, with all but the bias, and with padding."""
        parts = (t for name, t in self._buffers.items() if name != "bias" and t is not None)
        stored = sum(8 * t.numel() * t.element_size() for t in parts)
        return stored / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        symmetry = "symmetric" if self.zeros is None else "asymmetric"
        structure = "2:4 sparse"
        if not self.sparse:
            structure = f"act_order={self._buffers['perm'] is not None}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, {symmetry}, {structure}, "
            f"bias={self.bias is not None}, {self.bits_per_weight:.4g} bits/weight"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no 'weight': it holds 4-bit codes in 'qweight'. Use "
                "layer.dequantize() for the values, layer.scales.dtype and layer.scales.device "
                "for what weight.dtype and weight.device would say"
            )
        return super().__getattr__(name)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        check_dtypes_kept(type(self).__name__, fn, self._buffers)
        self._watch.forget()
        return cast(Module, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        problems = state_dict_problems(self, state_dict, prefix, assign)
        saved = (local_metadata.get("in_features"), local_metadata.get("out_features"))
        own = (self.in_features, self.out_features)
        if prefix + "qweight" in state_dict and None not in saved and saved != own:
            problems.insert(
                0,
                f"{prefix.removesuffix('.') or type(self).__name__}: got the state of a layer with "
                f"in_features={saved[0]}, out_features={saved[1]}; this one has {own[0]} and "
                f"{own[1]}, and the padded qweight does not tell; build it with the other's",
            )
        if problems:  # nothing is copied: a layer of old codes and new scales would be neither
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._watch.forget()
        if assign:
            self.adopt_buffers()

    def adopt_buffers(self) -> None:
        """Make tensors that others have put in place of the buffers fit for the kernels."""
        self._watch.forget()
        for key, tensor in self._buffers.items():
            self._buffers[key] = aligned(tensor)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the version that torch keeps there, not as a tensor of its own: strict loading and
        # checkpoint tools know the names of the buffers only.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["in_features"] = self.in_features
            metadata["out_features"] = self.out_features
