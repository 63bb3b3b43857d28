"""``MarlinLinear24``: ``torch.nn.Linear`` with a 4-bit weight of which half is not stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from marlin._packed_linear import PackedLinear
from marlin.formats.marlin_24 import read_marlin_24
from marlin.formats.packed import PackedWeight, cast_bias, describe, label
from marlin.formats.sparse import FIRST_PLACES, quad_problem, sparsify
from marlin.prune import check_method, weights_to_keep
from marlin.quantize import check_weight


class MarlinLinear24(PackedLinear):
    """``y = x W^T + bias`` with W in 4 bits and 2:4 sparse: in 3.13 bits per weight, not 4.13.

    Of every four neighbouring input features of an output feature, at most two have a weight that
    is not zero; two are stored, with their places. Otherwise it is used as ``MarlinLinear`` is:
    inputs, gradients, casts, state dicts and ``static_weights`` are described there.

    K is a multiple of 4; there is no act-order. ``from_pruned`` makes a layer from weights that are
    2:4 already, ``from_gptq``, ``from_awq`` and ``from_compressed_tensors`` from quantised ones
    whose zeros are 2:4 (a code equal to its zero point counts as zero), and ``from_marlin_24`` from
    ``marlin-24`` checkpoints. ``from_linear`` prunes by magnitude, to try the layer out. All of
    them refuse a weight that is not 2:4 and name the first four weights that break the rule.

    Attributes:
        qweight: int32 ``[ceil(N/64), ceil(K/128), 512]``, the packed codes of the stored weights.
        places: int32 ``[ceil(N/64), ceil(K/128), 256]``, where they are: ``meta`` of
            ``torch.ops.marlin.gemm_24``, a name that ``torch.export`` does not allow a buffer.
        scales: fp16 or bf16 ``[G, N]``, groups counting all input features.
        zeros: uint8 ``[G, N]`` of 0..15, or None: symmetric, 8 everywhere.
        bias: ``[N]`` in the dtype of ``scales``, or None.
        group_size: 32, 64 or 128; -1 when all of a row is one group (also if K <= the size asked).
        static_weights: as in ``MarlinLinear``.
    """

    sparse = True
    places: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        group_size: int = 128,
        zeros: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """An all-zero layer. ``zeros``: asymmetric.

        Raises:
            ValueError: a feature count is not positive, ``in_features`` is not a multiple of 4, or
                the group size is not supported.
            TypeError: ``dtype`` is neither fp16 nor bf16.
        """
        problem = quad_problem(in_features)
        if problem:
            raise ValueError(problem)
        optional = {"zeros": zeros, "bias": bias}
        super().__init__(in_features, out_features, optional, group_size, device, dtype)
        self.places.fill_(FIRST_PLACES)

    @classmethod
    def from_packed(
        cls,
        qweight: Tensor,
        places: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int,
        out_features: int,
    ) -> MarlinLinear24:
        """A layer around the tensors of ``torch.ops.marlin.pack_24``; shapes as in the attributes.

        They are shared; one that is not at a 16-byte boundary, which the kernels need, is copied.

        Raises:
            ValueError: a tensor has another shape, device or layout, ``zeros`` exceed 15, or two
                ``places`` of a quad do not rise.
            TypeError: a tensor has another dtype.
        """
        tensors: dict[str, Tensor | None] = {
            "qweight": qweight,
            "places": places,
            "scales": scales,
            "zeros": zeros,
            "bias": bias,
        }
        return cls._from_tensors(tensors, in_features, out_features)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        prune: str,
        group_size: int = 128,
        symmetric: bool = True,
        dtype: torch.dtype | None = None,
    ) -> MarlinLinear24:
        """Prune ``linear`` to 2:4 and round what is left to nearest, on its device.

        Pruning without calibration costs quality: it is for trying the layer out.

        Args:
            linear: an fp16, bf16, fp32 or fp64 layer, unchanged; a meta one gives a meta layer.
            prune: which two of every four weights are kept: ``"magnitude"``, the largest.
            group_size: input features that share a scale: 32, 64, 128, or -1 for all.
            symmetric: zero point 8 everywhere; False fits one per group.
            dtype: of scales, bias and activations; None keeps fp16 or bf16, else means fp16.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or a dtype is not supported.
            ValueError: ``prune`` is another method, ``in_features`` is not a multiple of 4, or the
                weight or bias is not finite or exceeds ``dtype``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear: got {type(linear).__name__}; from_linear prunes torch.nn.Linear; use "
                "marlin.replace_linear(model, sparse=True, prune='magnitude') for a whole model"
            )
        check_method(prune)
        if prune is None:
            raise ValueError("prune: got None; use from_pruned for a weight that is 2:4 already")
        choose = partial(weights_to_keep, prune=prune)
        return cls._rounded(linear, group_size, symmetric, dtype, choose)

    @classmethod
    def from_pruned(
        cls,
        source: nn.Linear | Tensor,
        bias: Tensor | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear24:
        """Round a weight that is 2:4 already to nearest, on its device.

        Args:
            source: the layer, or its weight ``[out_features, in_features]``; fp16, bf16, fp32 or
                fp64, unchanged; a meta one gives a meta layer.
            bias: float ``[out_features]``, with a weight only; None: no bias.
            group_size: input features that share a scale: 32, 64, 128, or -1 for all.
            symmetric: zero point 8 everywhere; False fits one per group.
            dtype: of scales, bias and activations; None keeps fp16 or bf16, else means fp16.
            layer: name of the layer, for error messages.

        Raises:
            TypeError: ``source`` is neither, ``bias`` is given beside a layer, or a dtype is not
                supported.
            ValueError: the weight is not 2:4, not a matrix or not finite, exceeds ``dtype``, or
                ``bias`` does not fit it.
        """
        if isinstance(source, nn.Linear):
            if bias is not None:
                raise TypeError(
                    f"{label(layer)}bias: got a tensor beside an nn.Linear, which has its own; "
                    "pass source.weight to choose another"
                )
            linear = source
        else:
            linear = _linear_of(source, bias, layer)
        choose = partial(weights_to_keep, prune=None, layer=layer)
        return cls._rounded(linear, group_size, symmetric, dtype, choose, layer)

    @classmethod
    def from_marlin_24(
        cls,
        weight_packed: Tensor,
        scale_packed: Tensor,
        meta: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        layer: str = "",
    ) -> MarlinLinear24:
        """A layer from compressed-tensors ``marlin-24`` tensors (4-bit), exactly.

        The tensors ``B_24``, ``s`` and ``B_meta`` of ``marlin_24`` checkpoints are the same. Shapes
        and errors: :func:`marlin.formats.marlin_24.read_marlin_24`; ``dtype`` and ``layer``: as for
        ``from_gptq``.
        """
        packed = read_marlin_24(weight_packed, scale_packed, meta, dtype=dtype, layer=layer)
        bias = cast_bias(bias, packed.scales.dtype, dtype, layer)
        return cls._around(packed._replace(bias=bias), layer)

    @classmethod
    def _around(cls, packed: PackedWeight, layer: str = "") -> MarlinLinear24:
        if packed.places is None:
            packed = sparsify(packed, layer)
        qweight, scales, zeros, _, k, n, bias, places = packed
        return cls.from_packed(
            qweight, cast(Tensor, places), scales, zeros, bias, in_features=k, out_features=n
        )

    def _multiply(self, input: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor:
        return cast(
            Tensor,
            torch.ops.marlin.gemm_24(
                input,
                buffers["qweight"],
                buffers["places"],
                buffers["scales"],
                buffers["zeros"],
                buffers["bias"],
                static_weights=self._weights_are_static(),
            ),
        )

    def dequantize(self) -> Tensor:
        """The weight as the layer computes with it: ``[out_features, in_features]``."""
        return cast(
            Tensor,
            torch.ops.marlin.dequantize_24(
                self.qweight, self.places, self.scales, self.zeros, k=self.in_features
            ),
        )


def _linear_of(weight: Tensor, bias: Tensor | None, layer: str) -> nn.Linear:
    """An ``nn.Linear`` that holds the tensors themselves."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{label(layer)}source: got {type(weight).__name__}; from_pruned takes a "
            "torch.nn.Linear or its weight; use marlin.replace_linear(model, sparse=True) for a "
            "whole model"
        )
    check_weight(weight, torch.float16, layer)
    n, k = weight.shape
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
        raise ValueError(
            f"{label(layer)}bias: got {describe(bias)}; it must be float [{n}], one for each row "
            "of the weight; pass None for a layer without bias"
        )
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
