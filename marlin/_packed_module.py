"""The base of layers with packed weights: how they are copied, cast, loaded and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from marlin._linear_checks import check_dtypes_kept, state_dict_problems
from marlin._weight_watch import WeightWatch

Module = TypeVar("Module", bound="PackedModule")


class PackedModule(nn.Module):
    """A layer whose weight is a set of buffers, some of which may be None.

    Attributes:
        static_weights: the promise to the kernel that nothing in flight still writes the weights,
            so that it may fetch them before the previous kernel ends. None, the default: promised
            when the buffers are those of the last call, unwritten since, and always in a compiled
            graph, where weights count as constants. Set it to False to write them on the GPU from
            inside a compiled graph, and to True for a layer that was made in inference mode, whose
            writes cannot be seen.
    """

    static_weights: bool | None = None

    def _set_buffers(self, **tensors: Tensor | None) -> None:
        # Absent ones last: torch.export (2.11) numbers the buffers of a root module without looking
        # whether they are None, and fails on a tensor that comes after a None.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self._watch = WeightWatch()

    def _weights_are_static(self) -> bool:
        """Whether no kernel in flight can be writing the weights: see ``static_weights``."""
        if self.static_weights is not None:
            return self.static_weights
        if torch.compiler.is_compiling():
            return True
        return self._watch.unchanged(self._buffers.values())

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no 'weight': it holds 4-bit codes in 'qweight'. Use "
                "layer.dequantize() for the values, layer.scales.dtype and layer.scales.device "
                "for what weight.dtype and weight.device would say"
            )
        return super().__getattr__(name)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        check_dtypes_kept(fn, self._buffers)
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
        if problems:  # nothing is copied: a layer of old codes and new scales would be neither
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
