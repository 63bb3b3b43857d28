"""compressed-tensors ``pack-quantized`` tensors: exact, and a reason for each refusal."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from checkpoints import pack_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlin import CheckpointError, MarlinLinear
from marlin.formats.compressed_tensors import (
    pack_compressed_tensors,
    parse_compressed_tensors_config,
    unpack_nibbles,
)


def make_tensors(
    n: int,
    k: int,
    group_size: int,
    *,
    zeros: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[dict[str, Any], Tensor]:
    """The tensors of a layer, and its weight in fp64 [N, K]."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    z = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=g)
    scale = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(dtype)
    group = reference.group_of_column(k, groups)
    if act_order:
        group = group[torch.randperm(k, generator=g)]
    zero = z.double() if zeros else torch.full((n, groups), 8.0).double()
    weight = (q.double() - zero[:, group]) * scale.double()[:, group]
    tensors: dict[str, Any] = {
        "weight_packed": pack_rows(q),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
        "weight_zero_point": pack_rows(z.T).T if zeros else None,
        "weight_g_idx": group.int() if act_order else None,
    }
    return tensors, weight


def to(device: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in tensors.items()}


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (72, 200), (64, 129), (65, 251), (128, 256)], ids=str)
def test_conversion_is_exact(
    device: str, shape: tuple[int, int], group_size: int, zeros: bool, act_order: bool
) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors, weight = make_tensors(
            *shape, group_size, zeros=zeros, act_order=act_order, dtype=dtype
        )
        bias = torch.randn(shape[0]).to(dtype).to(device)
        layer = MarlinLinear.from_compressed_tensors(**to(device, tensors), bias=bias)
        assert (layer.out_features, layer.in_features) == shape
        assert layer.qweight.device.type == device
        assert torch.equal(layer.dequantize().cpu(), weight.to(dtype))
        assert torch.equal(layer.bias, bias)
        x = torch.randn(3, shape[1]).to(dtype).to(device)
        reference.assert_close(layer(x), x, weight, bias)


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_unpack_nibbles_inverts_packing(rows: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=g)
    assert torch.equal(unpack_nibbles(pack_rows(q), columns), q)


def test_zero_points_of_8_are_dropped() -> None:
    tensors, weight = make_tensors(64, 128, 64)
    tensors["weight_zero_point"] = pack_rows(torch.full((2, 64), 8)).T
    layer = MarlinLinear.from_compressed_tensors(**tensors)
    assert layer.zeros is None
    assert torch.equal(layer.dequantize(), weight.bfloat16())


def test_zero_points_of_older_files() -> None:
    """Before they were packed, they were int8 [N, G], signed."""
    tensors, weight = make_tensors(65, 128, 64, zeros=True)
    packed = tensors["weight_zero_point"]
    tensors["weight_zero_point"] = (unpack_nibbles(packed.T, 65).T.int() - 8).to(torch.int8)
    layer = MarlinLinear.from_compressed_tensors(**tensors)
    assert torch.equal(layer.dequantize(), weight.bfloat16())
    tensors["weight_zero_point"][3, 1] = 8
    with pytest.raises(CheckpointError, match=r"weight_zero_point: got int8 values -8\.\.8"):
        pack_compressed_tensors(**tensors)


@pytest.mark.parametrize("shape", [torch.tensor([64, 128]), (64, 128), torch.Size([64, 128]),
                                   torch.tensor([64, 128], dtype=torch.int32)])  # fmt: skip
@pytest.mark.parametrize("g_idx", [None, torch.full((128,), -1), torch.arange(128) // 64])
def test_forms_of_the_same_layer(shape: Any, g_idx: Tensor | None) -> None:
    tensors, weight = make_tensors(64, 128, 64)
    tensors |= {"weight_shape": shape, "weight_g_idx": g_idx}
    layer = MarlinLinear.from_compressed_tensors(**tensors)
    assert layer.perm is None
    assert torch.equal(layer.dequantize(), weight.bfloat16())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"weight_packed": torch.zeros(64, 32, dtype=torch.int32)},
         ("weight_packed: got int32 [64, 32]", "int32 [64, 16]", "8-bit", "num_bits")),
        ({"weight_packed": torch.zeros(64, 16)}, ("weight_packed: got float32 [64, 16]",)),
        ({"weight_scale": torch.zeros(2, 64).half()}, ("weight_scale: got float16 [2, 64]",
                                                       "[64, groups]")),
        ({"weight_scale": torch.zeros(1).half()}, ("weight_scale: got float16 [1]", "block")),
        ({"weight_scale": torch.zeros(64, 0).half()}, ("weight_scale: got float16 [64, 0]",)),
        ({"weight_scale": torch.zeros(64, 3).half()}, ("3 groups for in_features=128",)),
        ({"weight_scale": torch.zeros(64, 2)}, ("weight_scale: got float32", "dtype=")),
        ({"weight_scale": torch.full((64, 2), float("inf")).half()}, ("weight_scale: got inf",)),
        ({"weight_scale": torch.zeros(64, 2, device="meta").half()},
         ("weight_scale: got a tensor on meta", "weight_scale.to('cpu')")),
        ({"weight_shape": torch.tensor([64])}, ("weight_shape: got int64 [1] = [64]",
                                                "two positive integers")),
        ({"weight_shape": torch.tensor([64.0, 128.0])}, ("weight_shape: got float32",)),
        ({"weight_shape": (0, 128)}, ("weight_shape: got (0, 128)",)),
        ({"weight_shape": (4, 64, 128)}, ("weight_shape: got (4, 64, 128)", "linear layer")),
        ({"weight_shape": (128, 64)}, ("weight_packed: got int32 [64, 16]", "(128, 64)")),
        ({"weight_zero_point": torch.zeros(64, 2, dtype=torch.int32)},
         ("weight_zero_point: got int32 [64, 2]", "int32 [8, 2]", "None")),
        ({"weight_zero_point": torch.zeros(8, 2)}, ("weight_zero_point: got float32",)),
        ({"weight_g_idx": torch.zeros(127, dtype=torch.int32)},
         ("weight_g_idx: got int32 [127]", "integers [128]", "None")),
        ({"weight_g_idx": torch.zeros(128)}, ("weight_g_idx: got float32 [128]",)),
        ({"weight_g_idx": torch.full((128,), 2)}, ("g_idx[0] is 2", "0..1")),
        ({"weight_g_idx": torch.zeros(128, dtype=torch.int64)}, ("128 features into group 0",)),
    ],
)  # fmt: skip
def test_refused_tensors(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    tensors, _ = make_tensors(64, 128, 64)
    with pytest.raises(CheckpointError) as caught:
        pack_compressed_tensors(**{**tensors, **changes}, layer="model.layers.0.q_proj")
    for part in ("model.layers.0.q_proj: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    tensors, _ = make_tensors(64, 128, 64, dtype=dtype)
    scales = tensors["weight_scale"]
    tensors["weight_scale"], bias = scales.float(), torch.full((64,), 0.1)
    with pytest.raises(CheckpointError, match=r"weight_scale: got float32.*pass dtype="):
        MarlinLinear.from_compressed_tensors(**tensors, bias=bias)
    layer = MarlinLinear.from_compressed_tensors(**tensors, bias=bias, dtype=dtype)
    assert torch.equal(layer.scales, scales.T)
    assert torch.equal(layer.bias, bias.to(dtype))


def test_bias_must_fit() -> None:
    tensors, _ = make_tensors(64, 128, 64, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"v: bias: got .* exactly"):
        MarlinLinear.from_compressed_tensors(**tensors, bias=torch.full((64,), 1e-3), layer="v")


# ---- the package itself, where it is installed


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(64, 256), (72, 384), (65, 128)], ids=str)
def test_against_the_package(strategy: str, symmetric: bool, shape: tuple[int, int]) -> None:
    """What the package compresses, we read as the package itself decompresses it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group_size = 128 if strategy == "group" else None
    args = QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    (n, k), g = shape, torch.Generator().manual_seed(0)
    groups = k // 128 if strategy == "group" else 1
    state = {
        "weight": torch.randn(n, k, generator=g).bfloat16(),
        "weight_scale": (torch.rand(n, groups, generator=g) * 0.3 + 0.2).bfloat16(),
        "weight_zero_point": torch.randint(-8, 8, (n, groups), generator=g).to(torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    layer = MarlinLinear.from_compressed_tensors(
        stored["weight_packed"],
        stored["weight_scale"],
        stored["weight_shape"],
        stored.get("weight_zero_point"),
    )
    assert (layer.zeros is None) == symmetric
    weight = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(layer.dequantize(), weight)
    config = {
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    group = parse_compressed_tensors_config(config).groups[0]
    assert (group.group_size, group.symmetric) == (group_size or -1, symmetric)
