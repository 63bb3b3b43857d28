"""``MarlinLinear``: ``torch.nn.Linear`` with a 4-bit weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from marlin._linear_checks import check_operands
from marlin._linear_sources import quantize_linear, read_gptq
from marlin._packed_module import PackedModule
from marlin.formats.awq import pack_awq
from marlin.formats.compressed_tensors import pack_compressed_tensors
from marlin.formats.packed import (
    COMPUTE_DTYPES,
    PackedWeight,
    cast_exactly,
    group_count,
    group_size_of,
)


class MarlinLinear(PackedModule):
    """``y = x W^T + bias`` with W in 4 bits: ``W[n, k] = (q[n, k] - zero) * scale``.

    The input is fp16 or bf16, the dtype of ``scales``, of any leading shape: ``[..., in_features]``
    gives ``[..., out_features]``. Under ``torch.autocast`` the input is cast, as for ``nn.Linear``.
    The input has a gradient; the weight is frozen, so the layer has buffers and no parameters.

    A new layer is all zeros, to be filled by ``load_state_dict``; ``from_linear``, ``from_gptq``,
    ``from_awq`` and ``from_compressed_tensors`` make one from weights.

    Attributes:
        qweight: int32 ``[ceil(N/64), ceil(K/64), 512]``, the packed codes.
        scales: fp16 or bf16 ``[G, N]``.
        zeros: uint8 ``[G, N]`` of 0..15, or None: symmetric, 8 everywhere.
        perm: int32 ``[K]``, packed column j multiplies input feature ``perm[j]``, or None.
        bias: ``[N]`` in the dtype of ``scales``, or None.
        group_size: 32, 64 or 128; -1 when all of a row is one group (also if K <= the size asked).
        static_weights: see :class:`marlin._packed_module.PackedModule`.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        group_size: int = 128,
        zeros: bool = False,
        perm: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """An all-zero layer. ``zeros``: asymmetric; ``perm``: act-order (starts as 0..K-1).

        Raises:
            ValueError: a feature count is not positive, or the group size is not supported.
            TypeError: ``dtype`` is neither fp16 nor bf16.
        """
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features)):
            if count < 1:
                raise ValueError(
                    f"{name}: got {count}; it must be at least 1; use nn.Linear for an empty layer"
                )
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"dtype: got {dtype}; scales and activations are torch.float16 or torch.bfloat16; "
                "pass one of the two"
            )
        self.in_features, self.out_features = in_features, out_features
        n, k, groups = out_features, in_features, group_count(in_features, group_size)
        self.group_size = group_size_of(k, groups)
        words = (-(-n // 64), -(-k // 64), 512)
        self._set_buffers(
            qweight=torch.zeros(words, dtype=torch.int32, device=device),
            scales=torch.zeros(groups, n, dtype=dtype, device=device),
            zeros=torch.zeros(groups, n, dtype=torch.uint8, device=device) if zeros else None,
            perm=torch.arange(k, dtype=torch.int32, device=device) if perm else None,
            bias=torch.zeros(n, dtype=dtype, device=device) if bias else None,
        )

    @classmethod
    def from_packed(
        cls,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int,
        out_features: int,
    ) -> MarlinLinear:
        """A layer around packed tensors (shared, not copied); shapes as in the class attributes.

        Raises:
            ValueError: a tensor has another shape, device or layout, ``zeros`` exceed 15, or
                ``perm`` is not a permutation of the input features.
            TypeError: a tensor has another dtype.
        """
        tensors = {"qweight": qweight, "scales": scales, "zeros": zeros, "perm": perm, "bias": bias}
        check_operands(tensors, in_features, out_features)
        layer = cls(in_features, out_features, device="meta", dtype=scales.dtype)
        layer.group_size = group_size_of(in_features, scales.size(0))
        layer._set_buffers(**tensors)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        dtype: torch.dtype | None = None,
    ) -> MarlinLinear:
        """Quantise ``linear`` by rounding to nearest (see :mod:`marlin.quantize`), on its device.

        Args:
            linear: an fp16, bf16, fp32 or fp64 layer, unchanged; a meta one gives a meta layer.
            group_size: input features that share a scale: 32, 64, 128, or -1 for all.
            symmetric: zero point 8 everywhere; False fits one per group: smaller errors, 4.19
                instead of 4.13 bits per weight at group size 128.
            dtype: of scales, bias and activations; None keeps fp16 or bf16, else means fp16.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or a dtype is not supported.
            ValueError: the weight or bias is not finite or exceeds ``dtype``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear: got {type(linear).__name__}; from_linear quantises torch.nn.Linear; use "
                "marlin.replace_linear(model) for a whole model"
            )
        if dtype is None:
            own = linear.weight.dtype
            dtype = own if own in COMPUTE_DTYPES else torch.float16
        if linear.weight.is_meta:
            layer = cls(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                group_size=group_size,
                zeros=not symmetric,
                device="meta",
                dtype=dtype,
            )
        else:
            layer = cls._from_weight(*quantize_linear(linear, group_size, symmetric, dtype))
        return layer.train(linear.training)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        checkpoint_format: str = "gptq",
        sym: bool | None = None,
        zeros_carry: bool = False,
        layer: str = "",
    ) -> MarlinLinear:
        """A layer from GPTQ tensors, exactly; shapes in :mod:`marlin.formats.gptq`.

        Args:
            qweight: int32 ``[K/8, N]``.
            qzeros: int32 ``[G, N/8]``.
            scales: fp16 or bf16 ``[G, N]``.
            g_idx: int ``[K]``, the group of each input feature; None: in order, no act-order.
            bias: ``[N]`` or None.
            checkpoint_format: ``"gptq"`` stores zero points minus one, ``"gptq_v2"`` as they are.
            sym: True refuses zero points other than 8; None and False take what is stored.
            zeros_carry: the minus one was taken from whole words, as GPTQModel does.
            layer: name of the layer, for error messages.

        Raises:
            CheckpointError: a tensor does not fit (a ``ValueError`` that lists every reason).
            ValueError: ``checkpoint_format`` is another one.
        """
        source = read_gptq(
            qweight, qzeros, scales, g_idx, bias, checkpoint_format, sym, zeros_carry, layer
        )
        return cls._from_weight(*source, layer)

    @classmethod
    def from_awq(
        cls,
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        layer: str = "",
    ) -> MarlinLinear:
        """A layer from AWQ "gemm" tensors, exactly; shapes and errors: ``marlin.formats.awq``."""
        return cls._from_weight(pack_awq(qweight, qzeros, scales, layer=layer), bias, layer)

    @classmethod
    def from_compressed_tensors(
        cls,
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_shape: Tensor | Sequence[int],
        weight_zero_point: Tensor | None = None,
        weight_g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        layer: str = "",
    ) -> MarlinLinear:
        """A layer from compressed-tensors ``pack-quantized`` tensors, 4-bit, exactly.

        Shapes and errors: :func:`marlin.formats.compressed_tensors.pack_compressed_tensors`.
        """
        packed = pack_compressed_tensors(
            weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx, layer=layer
        )
        return cls._from_weight(packed, bias, layer)

    @classmethod
    def _from_weight(
        cls, packed: PackedWeight, bias: Tensor | None, layer: str = ""
    ) -> MarlinLinear:
        if bias is not None:
            bias = cast_exactly(bias.detach(), packed.scales.dtype, layer, "bias")
        qweight, scales, zeros, perm, k, n = packed
        return cls.from_packed(qweight, scales, zeros, perm, bias, in_features=k, out_features=n)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in_features]`` -> ``[..., out_features]``, in the same dtype."""
        buffers = self._buffers
        scales = cast(Tensor, buffers["scales"])
        if input.dtype != scales.dtype and torch.is_autocast_enabled(input.device.type):
            input = input.to(scales.dtype)
        if input.dim() and input.stride(-1) != 1:  # nn.Linear takes a transposed input, too
            input = input.contiguous()
        return cast(
            Tensor,
            torch.ops.marlin.gemm(
                input,
                buffers["qweight"],
                scales,
                buffers["zeros"],
                buffers["perm"],
                buffers["bias"],
                static_weights=self._weights_are_static(),
            ),
        )

    def dequantize(self) -> Tensor:
        """The weight as the layer computes with it: ``[out_features, in_features]``."""
        return cast(
            Tensor,
            torch.ops.marlin.dequantize(
                self.qweight, self.scales, self.zeros, self.perm, k=self.in_features
            ),
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, with scales, zeros, order and padding, without the bias."""
        parts = (self.qweight, self.scales, self.zeros, self.perm)
        stored = sum(8 * t.numel() * t.element_size() for t in parts if t is not None)
        return stored / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        symmetry = "symmetric" if self.zeros is None else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, {symmetry}, act_order={self.perm is not None}, "
            f"bias={self.bias is not None}, {self.bits_per_weight:.4g} bits/weight"
        )
