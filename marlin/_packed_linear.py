"""What ``MarlinLinear`` and ``MarlinLinear24`` share: how they are made, and their forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from marlin._linear_checks import check_counts, check_operands
from marlin._linear_sources import check_linear, quantize_linear, read_gptq
from marlin._packed_module import PackedModule
from marlin.formats.awq import pack_awq
from marlin.formats.compressed_tensors import pack_compressed_tensors
from marlin.formats.packed import (
    COMPUTE_DTYPES,
    PackedWeight,
    aligned,
    cast_bias,
    group_count,
    group_size_of,
    operands,
)

Layer = TypeVar("Layer", bound="PackedLinear")


class PackedLinear(PackedModule):
    """A linear layer of packed 4-bit weights. Its subclasses say how they are multiplied."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        optional: Mapping[str, bool],
        group_size: int,
        device: torch.device | str | int | None,
        dtype: torch.dtype,
    ) -> None:
        """An all-zero layer with those of the ``optional`` tensors that are asked for."""
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features)
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"dtype: got {dtype}; scales and activations are torch.float16 or torch.bfloat16; "
                "pass one of the two"
            )
        self.in_features, self.out_features = in_features, out_features
        groups = group_count(in_features, group_size)
        self.group_size = group_size_of(in_features, groups)
        rules = operands(in_features, out_features, groups, dtype, sparse=self.sparse)
        tensors = {
            name: torch.zeros(shape, dtype=kind, device=device)
            if optional.get(name, True)
            else None
            for name, (kind, shape) in rules.items()
        }
        self._set_buffers(**tensors)

    @classmethod
    def _from_tensors(
        cls: type[Layer], tensors: dict[str, Tensor | None], in_features: int, out_features: int
    ) -> Layer:
        """A layer around packed tensors, once they are checked: see ``from_packed``."""
        check_operands(tensors, in_features, out_features, sparse=cls.sparse)
        scales = cast(Tensor, tensors["scales"])
        layer = cls._empty(in_features, out_features, dtype=scales.dtype)
        layer.group_size = group_size_of(in_features, scales.size(0))
        layer._set_buffers(**{name: aligned(tensor) for name, tensor in tensors.items()})
        return layer

    @classmethod
    def _empty(
        cls: type[Layer],
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        group_size: int = 128,
        zeros: bool = False,
        bias: bool = False,
    ) -> Layer:
        """A layer on the meta device, by the constructor that the subclasses have."""
        make = cast("type[Any]", cls)
        made: Layer = make(
            in_features,
            out_features,
            bias=bias,
            group_size=group_size,
            zeros=zeros,
            device="meta",
            dtype=dtype,
        )
        return made

    @classmethod
    def _around(cls: type[Layer], packed: PackedWeight, layer: str = "") -> Layer:
        """A layer of a dense weight as read from a checkpoint, or of one that is packed already.

        Raises:
            CheckpointError: the weight is not one that this kind of layer can hold.
        """
        raise NotImplementedError

    @classmethod
    def _rounded(
        cls: type[Layer],
        linear: nn.Linear,
        group_size: int,
        symmetric: bool,
        dtype: torch.dtype | None,
        choose: Callable[[Tensor], Tensor] | None = None,
        layer: str = "",
    ) -> Layer:
        """``linear`` rounded to nearest; ``choose`` says which weights a sparse layer keeps."""
        weight = linear.weight
        if dtype is None:
            dtype = weight.dtype if weight.dtype in COMPUTE_DTYPES else torch.float16
        if weight.is_meta:
            check_linear(linear, layer)
            made = cls._empty(
                linear.in_features,
                linear.out_features,
                dtype=dtype,
                group_size=group_size,
                zeros=not symmetric,
                bias=linear.bias is not None,
            )
        else:
            packed = quantize_linear(linear, group_size, symmetric, dtype, choose, layer)
            made = cls._around(packed, layer)
        return made.train(linear.training)

    @classmethod
    def from_gptq(
        cls: type[Layer],
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        checkpoint_format: str = "gptq",
        sym: bool | None = None,
        zeros_carry: bool = False,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> Layer:
        """A layer from GPTQ tensors, exactly; shapes in :mod:`marlin.formats.gptq`.

        Args:
            qweight: int32 ``[K/8, N]``.
            qzeros: int32 ``[G, N/8]``.
            scales: fp16 or bf16 (or fp32, with ``dtype``) ``[G, N]``.
            g_idx: int ``[K]``, the group of each input feature; None: in order, no act-order.
            bias: ``[N]`` or None.
            checkpoint_format: ``"gptq"`` stores zero points minus one, ``"gptq_v2"`` as they are.
            sym: True refuses zero points other than 8; None and False take what is stored.
            zeros_carry: the minus one was taken from whole words, as GPTQModel does.
            dtype: fp16 or bf16 for scales, which it must hold exactly, and for the bias, which is
                rounded to it; None keeps that of the scales, which must hold the bias exactly.
            layer: name of the layer, for error messages.

        Raises:
            CheckpointError: a tensor does not fit (a ``ValueError`` that lists every reason); for a
                sparse layer, the weight is not 2:4, or the layer has act-order.
            ValueError: ``checkpoint_format`` is another one.
        """
        packed = read_gptq(
            qweight, qzeros, scales, g_idx, bias, checkpoint_format, sym, zeros_carry, dtype, layer
        )
        return cls._around(packed, layer)

    @classmethod
    def from_awq(
        cls: type[Layer],
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> Layer:
        """A layer from AWQ "gemm" tensors, exactly; shapes and errors: ``marlin.formats.awq``.

        ``dtype`` and ``layer``: as for ``from_gptq``.
        """
        packed = pack_awq(qweight, qzeros, scales, dtype=dtype, layer=layer)
        bias = cast_bias(bias, packed.scales.dtype, dtype, layer)
        return cls._around(packed._replace(bias=bias), layer)

    @classmethod
    def from_compressed_tensors(
        cls: type[Layer],
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_shape: Tensor | Sequence[int],
        weight_zero_point: Tensor | None = None,
        weight_g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> Layer:
        """A layer from compressed-tensors ``pack-quantized`` tensors, 4-bit, exactly.

        Shapes and errors: :func:`marlin.formats.compressed_tensors.pack_compressed_tensors`;
        ``dtype`` and ``layer``: as for ``from_gptq``.
        """
        packed = pack_compressed_tensors(
            weight_packed,
            weight_scale,
            weight_shape,
            weight_zero_point,
            weight_g_idx,
            dtype=dtype,
            layer=layer,
        )
        bias = cast_bias(bias, packed.scales.dtype, dtype, layer)
        return cls._around(packed._replace(bias=bias), layer)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in_features]`` -> ``[..., out_features]``, in the same dtype.

        Raises:
            RuntimeError: the input has another number of features, dtype or device.
        """
        if input.dim() and input.size(-1) != self.in_features:  # the op knows K rounded up only
            raise RuntimeError(
                f"input: got {input.size(-1)} features; the layer has "
                f"in_features={self.in_features}; pass [..., {self.in_features}]"
            )
        buffers = self._buffers
        scales = cast(Tensor, buffers["scales"])
        if input.dtype != scales.dtype and torch.is_autocast_enabled(input.device.type):
            input = input.to(scales.dtype)
        if input.dim() and input.stride(-1) != 1:  # nn.Linear takes a transposed input, too
            input = input.contiguous()
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            return self._multiply_dual(input, buffers)
        return self._multiply(input, buffers)

    def _multiply_dual(self, input: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor:
        """As :meth:`forward`, with the derivative, which torch has no way to give a custom op."""
        primal, tangent = forward_ad.unpack_dual(input)  # type: ignore[no-untyped-call]
        output = self._multiply(primal, buffers)
        if tangent is None:
            return output
        moved = self._multiply(tangent, {**buffers, "bias": None})
        return cast(Tensor, forward_ad.make_dual(output, moved))  # type: ignore[no-untyped-call]

    def _multiply(self, input: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor:
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight as the layer computes with it: ``[out_features, in_features]``."""
        raise NotImplementedError
