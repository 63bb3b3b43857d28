"""``MarlinLinear``: ``torch.nn.Linear`` with a 4-bit weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from marlin._packed_linear import PackedLinear
from marlin.formats.original_marlin import read_original_marlin
from marlin.formats.packed import PackedWeight, cast_bias


class MarlinLinear(PackedLinear):
    """``y = x W^T + bias`` with W in 4 bits: ``W[n, k] = (q[n, k] - zero) * scale``.

    The input is fp16 or bf16, the dtype of ``scales``, of any leading shape: ``[..., in_features]``
    gives ``[..., out_features]``. Under ``torch.autocast`` the input is cast, as for ``nn.Linear``.
    The input has a gradient; the weight is frozen, so the layer has buffers and no parameters.

    A new layer is all zeros, to be filled by ``load_state_dict``; ``from_linear``, ``from_gptq``,
    ``from_awq``, ``from_compressed_tensors`` and ``from_original_marlin`` make one from weights. K
    and N cannot be told from the padded ``qweight``: a state dict, also through ``torch.save``,
    carries them beside the tensors, and loading into a layer of other sizes is refused. A bare
    safetensors file does not carry them; :func:`marlin.load` reads them from the checkpoint's
    ``config.json``.

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
            while the model runs, for compiled graphs and layers made in inference mode. Graphs that
            are compiled with ``torch._inductor.config.triton.enable_pdl`` don't promise it even
            then: kernels of theirs would start early, and read before they wait.
    """

    sparse = False
    perm: Tensor | None

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
        optional = {"zeros": zeros, "perm": perm, "bias": bias}
        super().__init__(in_features, out_features, optional, group_size, device, dtype)
        if self.perm is not None:
            torch.arange(in_features, out=self.perm)

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
        return cls._from_tensors(tensors, in_features, out_features)

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
        return cls._rounded(linear, group_size, symmetric, dtype)

    @classmethod
    def from_original_marlin(
        cls,
        B: Tensor,
        s: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear:
        """A layer from the tensors ``B`` and ``s`` of the original Marlin kernel, exactly.

        Shapes and errors: :func:`marlin.formats.original_marlin.read_original_marlin`; ``dtype``
        and ``layer``: as for ``from_gptq``.
        """
        packed = read_original_marlin(B, s, dtype=dtype, layer=layer)
        bias = cast_bias(bias, packed.scales.dtype, dtype, layer)
        return cls._around(packed._replace(bias=bias), layer)

    @classmethod
    def _around(cls, packed: PackedWeight, layer: str = "") -> MarlinLinear:
        qweight, scales, zeros, perm, k, n, bias, _ = packed
        return cls.from_packed(qweight, scales, zeros, perm, bias, in_features=k, out_features=n)

    def _multiply(self, input: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor:
        return cast(
            Tensor,
            torch.ops.marlin.gemm(
                input,
                buffers["qweight"],
                buffers["scales"],
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
