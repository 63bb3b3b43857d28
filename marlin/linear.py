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
    aligned,
    cast_bias,
    group_count,
    group_size_of,
    operands,
)


class MarlinLinear(PackedModule):
    """``y = x W^T + bias`` with W in 4 bits: ``W[n, k] = (q[n, k] - zero) * scale``.

    The input is fp16 or bf16, the dtype of ``scales``, of any leading shape: ``[..., in_features]``
    gives ``[..., out_features]``. Under ``torch.autocast`` the input is cast, as for ``nn.Linear``.
    The input has a gradient; the weight is frozen, so the layer has buffers and no parameters.

    A new layer is all zeros, to be filled by ``load_state_dict``; ``from_linear``, ``from_gptq``,
    ``from_awq`` and ``from_compressed_tensors`` make one from weights. K and N cannot be told from
    the padded ``qweight``: a state dict, also through ``torch.save``, carries them beside the
    tensors, and loading into a layer of other sizes is refused. A bare safetensors file does not
    carry them; :func:`marlin.load` reads them from the checkpoint's ``config.json``.

    Attributes:
        qweight: int32 ``[ceil(N/64), ceil(K/64), 512]``, the packed codes.
        scales: fp16 or bf16 ``[G, N]``.
        zeros: uint8 ``[G, N]`` of 0..15, or None: symmetric, 8 everywhere.
        perm: int32 ``[K]``, packed column j multiplies input feature ``perm[j]``, or None.
        bias: ``[N]`` in the dtype of ``scales``, or None.
        group_size: 32, 64 or 128; -1 when all of a row is one group (also if K <= the size asked).
        static_weights: the promise to the kernel that no kernel in flight still writes the tensors
            above, so that it may fetch them before the previous kernel ends. None, the default:
            promised in eager mode when every tensor has the address and the version that it had
            at the last call, and never under ``torch.compile`` and ``torch.export``. Not seen are
            writes through ``.data``, writes by CUDA graph replays or by code that is not
            PyTorch's, and a tensor freed and made anew at the same address between two calls: set
            False if a kernel writes the weights in such a way. Set True if nothing writes them
            while the model runs, for compiled graphs and layers made in inference mode.
    """

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
        groups = group_count(in_features, group_size)
        self.group_size = group_size_of(in_features, groups)
        absent = {"zeros": not zeros, "perm": not perm, "bias": not bias}
        rules = operands(in_features, out_features, groups, dtype)
        tensors = {
            name: None if absent.get(name) else torch.zeros(shape, dtype=kind, device=device)
            for name, (kind, shape) in rules.items()
        }
        if perm:
            tensors["perm"] = torch.arange(in_features, dtype=torch.int32, device=device)
        self._set_buffers(**tensors)

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
        """A layer around packed tensors; shapes as in the class attributes.

        They are shared; one that is not at a 16-byte boundary, which the kernels need, is copied.

        Raises:
            ValueError: a tensor has another shape, device or layout, ``zeros`` exceed 15, or
                ``perm`` is not a permutation of the input features.
            TypeError: a tensor has another dtype.
        """
        tensors = {"qweight": qweight, "scales": scales, "zeros": zeros, "perm": perm, "bias": bias}
        check_operands(tensors, in_features, out_features)
        tensors = {name: aligned(tensor) for name, tensor in tensors.items()}
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
            layer = cls._around(quantize_linear(linear, group_size, symmetric, dtype))
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
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear:
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
            CheckpointError: a tensor does not fit (a ``ValueError`` that lists every reason).
            ValueError: ``checkpoint_format`` is another one.
        """
        packed = read_gptq(
            qweight, qzeros, scales, g_idx, bias, checkpoint_format, sym, zeros_carry, dtype, layer
        )
        return cls._around(packed)

    @classmethod
    def from_awq(
        cls,
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear:
        """A layer from AWQ "gemm" tensors, exactly; shapes and errors: ``marlin.formats.awq``.

        ``dtype`` and ``layer``: as for ``from_gptq``.
        """
        packed = pack_awq(qweight, qzeros, scales, dtype=dtype, layer=layer)
        bias = cast_bias(bias, packed.scales.dtype, dtype, layer)
        return cls._around(packed._replace(bias=bias))

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
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear:
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
        return cls._around(packed._replace(bias=bias))

    @classmethod
    def _around(cls, packed: PackedWeight) -> MarlinLinear:
        qweight, scales, zeros, perm, k, n, bias = packed
        return cls.from_packed(qweight, scales, zeros, perm, bias, in_features=k, out_features=n)

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
