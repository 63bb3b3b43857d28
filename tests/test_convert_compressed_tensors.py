"""Whole compressed-tensors checkpoints: converted, verified, loaded, and refused when damaged."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import (
    GptqLayer,
    assert_holds,
    ct_config,
    ct_tensors,
    make_layer,
    make_sparse,
    read_all,
    write_checkpoint,
    write_tensors,
)
from conversions import (
    any_layer,
    assert_change_is_found,
    assert_logits,
    convert_exactly,
    is_symmetric,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert_24 import stored_weight
from torch import Tensor

from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

no_zeros = partial(ct_tensors, zeros="none")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zeros", ["packed", "int8", "none", "symmetric but stored"])
@pytest.mark.parametrize("actorder", ["group", "weight", None])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_variant_is_exact(
    tmp_path: Path, group_size: int, actorder: str | None, zeros: str, shards: int
) -> None:
    sym = zeros in ("none", "symmetric but stored")
    ordered = actorder == "group"
    layers = {
        "a.b": make_layer(256, 64, group_size, sym=sym, act_order=ordered, bias=True),
        "a.c": make_layer(203, 65, group_size, sym=sym, dtype=torch.bfloat16),
    }
    source = write_checkpoint(
        tmp_path / "src",
        layers,
        config=ct_config(group_size, symmetric=sym, actorder=actorder),
        shards=shards,
        tensors_of=partial(
            ct_tensors,
            zeros="packed" if "stored" in zeros else zeros,
            order="always" if ordered else "never",
        ),
    )
    report = convert_exactly(tmp_path)
    assert_holds(tmp_path / "dst", source)
    assert report.source_format == "compressed-tensors"
    assert [layer.zeros for layer in report.layers] == [not sym] * 2
    assert [layer.act_order for layer in report.layers] == [ordered and group_size != -1, False]
    assert [layer.dtype for layer in report.layers] == ["float16", "bfloat16"]
    assert not any(layer.sparse for layer in report.layers)


@settings(max_examples=40, deadline=None)
@given(layer=any_layer(), shard_bytes=st.integers(1, 20_000))
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory, layer: GptqLayer, shard_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    symmetric, ordered = is_symmetric(layer), bool((layer.g_idx.diff() < 0).any())
    source = write_checkpoint(
        root / "src",
        {"m.x": layer},
        config=ct_config(
            layer.group_size, symmetric=symmetric, actorder="group" if ordered else None
        ),
        tensors_of=partial(
            ct_tensors,
            zeros="none" if symmetric else "packed",
            order="always" if ordered else "never",
        ),
    )
    convert_exactly(root, shard_bytes=shard_bytes)
    assert_holds(root / "dst", source)


@pytest.mark.parametrize("actorder", ["group", "weight", None])
def test_an_order_that_is_not_set(tmp_path: Path, actorder: str | None) -> None:
    make = partial(ct_tensors, zeros="none", order="unset")
    source = write_checkpoint(
        tmp_path / "src", config=ct_config(actorder=actorder), tensors_of=make
    )
    convert_exactly(tmp_path)
    assert_holds(tmp_path / "dst", source)


def test_logits_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", config=ct_config(), tensors_of=no_zeros)
    convert_exactly(tmp_path)
    assert_logits(tmp_path, source)


def test_groups_and_ignored_modules(tmp_path: Path) -> None:
    layers = {
        "model.0.up": make_layer(128, 64, 32, seed=1),
        "model.1.up": make_layer(128, 64, 64, seed=2, sym=False),
        "model.1.down": make_layer(128, 64, -1, seed=3),
    }
    config = ct_config(32, ignore=["lm_head", r"re:.*\.gate$"])
    groups = config["quantization_config"]["config_groups"]
    for name, target, changes in (
        ("group_1", r"re:.*1\..*", {"group_size": 64, "symmetric": False}),
        ("group_2", "model.1.down", {"group_size": None, "strategy": "channel"}),
    ):
        groups[name] = copy.deepcopy(groups["group_0"])
        groups[name]["targets"] = [target]
        groups[name]["weights"] |= changes

    def make(layer: GptqLayer) -> dict[str, Tensor]:
        return ct_tensors(layer, zeros="packed" if layer.group_size == 64 else "none")

    others = {"lm_head.weight": torch.randn(8, 8), "model.0.gate.weight": torch.randn(8, 8)}
    source = write_checkpoint(
        tmp_path / "src", layers, config=config, others=others, tensors_of=make
    )
    convert_exactly(tmp_path)
    assert_holds(tmp_path / "dst", source)


def test_sparse_on_request(tmp_path: Path) -> None:
    layers = {
        "a.b": make_sparse(200, 72, bias=True),
        "a.c": make_layer(64, 64),
        "a.d": make_sparse(64, 64, act_order=True),
    }
    write_checkpoint(
        tmp_path / "src",
        layers,
        config=ct_config(actorder="group"),
        tensors_of=partial(ct_tensors, zeros="none", order="always"),
    )
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False, sparse=True)
    assert {r.name: r.sparse for r in report.layers} == {"a.b": True, "a.c": False, "a.d": False}
    got = stored_weight(read_all(tmp_path / "dst"), "a.b", layers["a.b"])
    assert torch.equal(got, layers["a.b"].weight())
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []


def test_scales_of_another_dtype(tmp_path: Path) -> None:
    layer = make_layer(64, 64, bias=True)
    layer.scales = layer.scales.float()
    write_checkpoint(tmp_path / "src", {"a.b": layer}, config=ct_config(), tensors_of=no_zeros)
    with pytest.raises(CheckpointError, match=r"a\.b: weight_scale: got float32.*dtype=torch"):
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
    convert(tmp_path / "src", tmp_path / "dst", progress=False, dtype=torch.float16)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("weight_packed", lambda t: t[3, 1].bitwise_xor_(1 << 8), "weight row 3, column 10 is"),
        ("weight_zero_point", lambda t: t[2, 1].bitwise_xor_(1 << 4), "zeros row 1 .*column 17 is"),
        ("weight_scale", lambda t: t[5, 1].mul_(2), r"scales row 1 \(group\), column 5 is"),
        ("bias", lambda t: t[7].add_(1), "bias column 7 is"),
    ],
)
def test_verify_finds_a_change(
    tmp_path: Path, leaf: str, change: Callable[[Tensor], object], says: str
) -> None:
    layers = {"a.b": make_layer(64, 64, sym=False, bias=True)}
    config = ct_config(symmetric=False)
    write_checkpoint(tmp_path / "src", layers, config=config, tensors_of=ct_tensors)
    assert_change_is_found(tmp_path, f"a.b.{leaf}", change, says)


def test_verify_finds_another_order(tmp_path: Path) -> None:
    layers = {"a.b": make_layer(64, 64, act_order=True)}
    config = ct_config(actorder="group")
    write_checkpoint(tmp_path / "src", layers, config=config, tensors_of=no_zeros)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    changed = read_all(tmp_path / "src")
    g_idx = changed["a.b.weight_g_idx"]
    first, other = 0, int((g_idx != g_idx[0]).nonzero()[0])
    g_idx[[first, other]] = g_idx[[other, first]].clone()
    write_tensors(tmp_path / "src", changed)
    found = verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches
    assert re.match(r"a\.b: input feature \d+ is in group \d, want \d", found[0])
