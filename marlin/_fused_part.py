"""A layer that was fused with others, in its old place and under its old name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from marlin.fused_linear import FusedLinear

TENSORS = ("qweight", "places", "scales", "zeros", "perm", "bias")


class FusedPart(nn.Module):
    """One of the layers of a ``FusedLinear``, in the place of the layer that it was.

    It has no tensors of its own; ``qweight``, ``scales``, ``zeros``, ``perm``, ``places`` and
    ``bias`` are views of the fused ones. Its state dict is that of the layer: a fused model is
    saved and loaded as if it was not fused. Loading copies, also with ``assign=True``.
    """

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = (fused,)  # a tuple, not a child: each part would list all of the tensors
        self.index = index
        self.in_features = fused.packed.in_features
        self.out_features = fused.sizes[index]
        self.group_size = fused.packed.group_size
        self.sparse = fused.packed.sparse
        self.train(fused.packed.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in_features]`` -> ``[..., out_features]``, a slice of a larger tensor.

        Raises:
            RuntimeError: the input has another number of features, dtype or device.
        """
        return self._fused[0].part(self.index, input)

    def dequantize(self) -> Tensor:
        """The weight as the layer computes with it: ``[out_features, in_features]``."""
        return self._fused[0].layer(self.index, copy=False).dequantize()

    @property
    def static_weights(self) -> bool | None:
        """As in :class:`marlin.MarlinLinear`, of all parts."""
        return self._fused[0].packed.static_weights

    @static_weights.setter
    def static_weights(self, value: bool | None) -> None:
        self._fused[0].packed.static_weights = value

    def extra_repr(self) -> str:
        """What ``print(model)`` shows beside the name."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __getattr__(self, name: str) -> Any:
        if name in TENSORS:
            tensors = self._fused[0].tensors(self.index)
            if name in tensors:
                return tensors[name]
        if name == "weight":
            return self._fused[0].packed.weight  # raises, and says what there is instead
        return super().__getattr__(name)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        layer = self._fused[0].layer(self.index, copy=False)
        layer._save_to_state_dict(destination, prefix, keep_vars)

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
        fused = self._fused[0]
        problem = self._loading_problem(state_dict, prefix, local_metadata)
        if problem:
            error_msgs.append(problem)
            return
        layer = fused.layer(self.index, copy=False)  # which checks what it gets
        layer._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with torch.no_grad():
            for name, tensor in fused.tensors(self.index).items():
                if tensor is not None:
                    tensor.copy_(cast(Tensor, layer._buffers[name]))

    def _loading_problem(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> str:
        """What a layer on its own would not have to refuse, or nothing."""
        fused = self._fused[0]
        order, other = fused.packed._buffers.get("perm"), state_dict.get(f"{prefix}perm")
        if isinstance(order, Tensor) and isinstance(other, Tensor) and not _equal(order, other):
            return (
                f"{prefix}perm: got another order than that of the layers that it is fused with "
                f"({', '.join(fused.names)}); call marlin.unfuse(model), load, and fuse again"
            )
        if fused.packed.qweight.is_meta and local_metadata.get("assign_to_params_buffers"):
            return (
                f"{prefix}qweight: the fused tensors are on the meta device, and loading copies "
                "into them; call model.to_empty(device=...), or load before fusing"
            )
        return ""


def _equal(one: Tensor, other: Tensor) -> bool:
    """On any device; meta tensors are equal to all, as they have no values."""
    if one.is_meta or other.is_meta:
        return True
    return torch.equal(one.cpu(), other.cpu())
