"""GPTQ configuration and layers as pure functions."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from checkpoints import GptqLayer, gptq_config, gptq_tensors, make_layer, pack_zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.gptq import (
    GptqSettings,
    group_order,
    pack_linear,
    parse_gptq_config,
    unpack_weight,
    unpack_zeros,
    zeros_are_ambiguous,
)
from marlin.formats.packed import PackedWeight


def pack(layer: GptqLayer, version: int = 1, **changes: Any) -> PackedWeight:
    tensors = {"bias": None, **gptq_tensors(layer, version)}
    settings = GptqSettings(layer.group_size, None, version)
    return pack_linear(**{**tensors, "settings": settings, **changes})  # type: ignore[arg-type]


def weight(packed: PackedWeight, k: int) -> torch.Tensor:
    return reference.dequantize64(packed.qweight, packed.scales, packed.zeros, packed.perm, k)


def words(*values: int) -> torch.Tensor:
    """One row of int32 words from unsigned values."""
    return torch.tensor([[v - 2**32 if v >= 2**31 else v for v in values]], dtype=torch.int32)


class TestLayer:
    @pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
    @pytest.mark.parametrize("sym", [True, False])
    @pytest.mark.parametrize("act_order", [True, False])
    def test_weight(self, group_size: int, sym: bool, act_order: bool) -> None:
        layer = make_layer(256, 40, group_size, sym=sym, act_order=act_order, bias=True)
        packed = pack(layer)
        assert torch.equal(weight(packed, 256), layer.weight())
        assert (packed.zeros is None) is sym
        assert (packed.perm is None) is (not act_order or group_size == -1)
        assert packed.bias is layer.bias
        assert packed.scales.dtype == torch.float16

    def test_only_the_data_decides_about_act_order(self) -> None:
        """Some files say desc_act and hold features in order, or the other way round."""
        layer = make_layer(128, 8, 32)
        assert pack(layer).perm is None
        layer.g_idx = layer.g_idx.flip(0)
        packed = pack(layer)
        assert packed.perm is not None
        assert packed.perm.dtype == torch.int32
        assert packed.perm.tolist() == [*range(96, 128), *range(64, 96), *range(32, 64), *range(32)]
        assert torch.equal(weight(packed, 128), layer.weight())

    def test_last_group_may_be_partial(self) -> None:
        layer = make_layer(72, 8, 32, sym=False)
        assert layer.scales.shape == (3, 8)
        assert torch.equal(weight(pack(layer), 72), layer.weight())

    def test_group_larger_than_the_layer_is_one_group(self) -> None:
        layer = make_layer(64, 8, 128)
        assert layer.scales.shape == (1, 8)
        assert torch.equal(weight(pack(layer), 64), layer.weight())

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_one_group_ignores_the_order(self, dtype: torch.dtype) -> None:
        layer = make_layer(64, 8, -1)
        layer.g_idx = torch.zeros(64, dtype=dtype)
        assert pack(layer).perm is None

    def test_strided_tensors(self) -> None:
        layer = make_layer(64, 16, 32)
        tensors = gptq_tensors(layer)
        transposed = {name: t.T.contiguous().T for name, t in tensors.items() if t.dim() == 2}
        packed = pack(layer, **transposed)
        assert torch.equal(weight(packed, 64), layer.weight())

    def test_inputs_are_not_changed(self) -> None:
        layer = make_layer(64, 16, 32, sym=False, act_order=True, bias=True)
        tensors = gptq_tensors(layer)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        pack_linear(**tensors, settings=GptqSettings(32))
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)

    def test_all_that_is_wrong_is_listed(self) -> None:
        layer = make_layer(64, 16, 32)
        layer.zeros[1, 3] = 5
        layer.scales[0, 2] = float("inf")
        layer.g_idx[0] = 9
        with pytest.raises(CheckpointError) as caught:
            pack(layer, settings=GptqSettings(32, sym=True), name="model.x")
        first, second, third = caught.value.refusals
        assert first == "model.x: g_idx[0] is 9, want a group in 0..1"
        assert "group 1, column 3 has 5" in second
        assert "scales" in third
        assert "[0, 2]" in third

    def test_shapes_are_checked_first(self) -> None:
        layer = make_layer(64, 16, 32)
        with pytest.raises(
            CheckpointError, match=r"layer: scales has shape \[1, 16\], want \[2, 16\]"
        ):
            pack(layer, scales=layer.scales[:1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_wider_values_are_cast_when_exact(self, dtype: torch.dtype) -> None:
        layer = make_layer(64, 16, 32, bias=True, dtype=dtype)
        want = layer.weight()
        layer.scales = layer.scales.float()
        assert layer.bias is not None
        layer.bias = layer.bias.float()
        packed = pack(layer, dtype=dtype)
        assert packed.scales.dtype == dtype
        assert packed.bias is not None
        assert packed.bias.dtype == dtype
        assert torch.equal(weight(packed, 64), want)

    def test_values_are_never_rounded(self) -> None:
        layer = make_layer(64, 16, 32, bias=True)
        with pytest.raises(CheckpointError, match=r"scales.*exactly"):
            pack(layer, dtype=torch.bfloat16)
        layer.bias = torch.full((16,), 1 + 2**-20)
        with pytest.raises(CheckpointError, match=r"bias.*exactly"):
            pack(layer)


class TestZeros:
    @given(seed=st.integers(0, 2**31), version=st.sampled_from([1, 2]))
    @settings(max_examples=50, deadline=None)
    def test_roundtrip(self, seed: int, version: int) -> None:
        random = torch.Generator().manual_seed(seed)
        zeros = torch.randint(0, 16, (3, 24), generator=random).to(torch.uint8)
        settings = GptqSettings(zeros_version=version)
        assert torch.equal(unpack_zeros(pack_zeros(zeros, version), settings), zeros)

    @pytest.mark.parametrize(("version", "word"), [(1, 0x77777777), (2, 0x88888888)])
    def test_symmetric_constants(self, version: int, word: int) -> None:
        found = unpack_zeros(words(word), GptqSettings(zeros_version=version))
        assert found.tolist() == [[8] * 8]

    def test_first_nibble_is_the_first_column(self) -> None:
        found = unpack_zeros(words(0xFEDCBA98), GptqSettings(zeros_version=2))
        assert found.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]

    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
    def test_carry_is_the_inverse_of_a_borrow(self, values: list[int]) -> None:
        """GPTQModel subtracts 0x11111111 from whole words, so a zero point of 0 borrows."""
        stored = words(*((value - 0x11111111) % 2**32 for value in values))
        found = unpack_zeros(stored, GptqSettings(zeros_carry=True))
        assert torch.equal(found, unpack_zeros(words(*values), GptqSettings(zeros_version=2)))

    def test_ambiguity(self) -> None:
        assert zeros_are_ambiguous(words(0x0000006F), GptqSettings())
        assert not zeros_are_ambiguous(words(0x77777777, 0xE0123456), GptqSettings())
        assert not zeros_are_ambiguous(words(0x0000006F), GptqSettings(zeros_version=2))
        assert not zeros_are_ambiguous(words(0x0000006F), GptqSettings(zeros_carry=True))


class TestOrder:
    @given(st.permutations(range(96)), st.sampled_from([32, 64]))
    @settings(max_examples=50, deadline=None)
    def test_sorts_stably(self, shuffled: list[int], group_size: int) -> None:
        """Whatever the assignment of features to full groups."""
        g_idx = torch.tensor(shuffled, dtype=torch.int32) // group_size
        order = group_order("x", g_idx, group_size)
        got = torch.arange(96) if order is None else order.long()
        assert torch.equal(g_idx[got].long(), torch.arange(96) // group_size)
        assert got.tolist() == sorted(range(96), key=lambda i: int(g_idx[i]))

    @pytest.mark.parametrize(
        ("g_idx", "reason"),
        [
            ([0] * 64, "64 features into group 0, want 32"),
            ([0] * 31 + [1] * 33, "31 features into group 0, want 32.*row-parallel"),
            ([0] * 32 + [2] * 32, r"g_idx\[32\] is 2, want a group in 0\.\.1"),
            ([-1] + [0] * 31 + [1] * 32, r"g_idx\[0\] is -1"),
        ],
    )
    def test_refuses(self, g_idx: list[int], reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason):
            group_order("x", torch.tensor(g_idx), 32)


def test_unpack_weight() -> None:
    q = torch.randint(0, 16, (24, 40), dtype=torch.uint8)
    assert torch.equal(unpack_weight(reference.gptq_pack(q)), q)


class TestConfig:
    def settings(self, **changes: Any) -> GptqSettings | None:
        return parse_gptq_config(gptq_config(**changes)).settings("model.layers.3.up")

    def test_defaults(self) -> None:
        assert self.settings(sym=None, checkpoint_format=None) == GptqSettings(32, None, 1, False)

    def test_aliases(self) -> None:
        found = self.settings(
            bits=None,
            w_bit=4,
            group_size=None,
            q_group_size=64,
            checkpoint_format=None,
            format="gptq_v2",
        )
        assert found == GptqSettings(64, True, 2, False)

    def test_what_does_not_matter_is_ignored(self) -> None:
        extra = {"true_sequential": True, "damp_percent": 0.1, "desc_act": True, "lm_head": True}
        assert self.settings(**extra) == GptqSettings(32, True, 1, False)

    def test_gptqmodel_carries(self) -> None:
        found = self.settings(meta={"quantizer": ["gptqmodel:5.6.0"]})
        assert found == GptqSettings(32, True, 1, True)

    def test_old_file_alone(self) -> None:
        old = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        found = parse_gptq_config({"model_type": "llama"}, old).settings("x")
        assert found == GptqSettings(128, True, 1, False)

    def test_both_places_complete_each_other(self) -> None:
        old = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
        config = gptq_config(checkpoint_format=None)
        assert parse_gptq_config(config, old).settings("x") == GptqSettings(32, True, 2, False)

    def test_each_disagreement_is_named(self) -> None:
        old = {"wbits": 8, "q_group_size": 32, "sym": False, "format": "gptq_v2"}
        with pytest.raises(CheckpointError) as caught:
            parse_gptq_config(gptq_config(), old)
        named = [text.split(" disagree on ")[1].split(":")[0] for text in caught.value.refusals]
        assert named == ["bits", "checkpoint_format", "sym"]

    @pytest.mark.parametrize(
        ("dynamic", "want"),
        [
            ({"-:.*up": {}}, None),
            ({"model": {"group_size": 64}, "-:.*up": {}}, None),  # excluding rules come first
            ({"+:model": {"group_size": 64}, ".*": {"group_size": -1}}, 64),  # the first match wins
            ({"layers": {"group_size": 64}}, 32),  # a pattern matches from the start
            ({"model.layers.3.up": {"q_group_size": 128}}, 128),
            ({"model": {}}, 32),
        ],
    )
    def test_dynamic(self, dynamic: dict[str, Any], want: int | None) -> None:
        found = self.settings(dynamic=dynamic)
        assert (found and found.group_size) == want

    def test_dynamic_overrides_bits_of_one_module_only(self) -> None:
        config = parse_gptq_config(gptq_config(dynamic={".*down": {"bits": 8}}))
        assert config.settings("model.up") is not None
        with pytest.raises(CheckpointError, match=r"model\.down: bits is 8"):
            config.settings("model.down")
