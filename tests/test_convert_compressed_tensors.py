"""Whole compressed-tensors checkpoints: converted, verified, loaded, and refused when damaged."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    Tiny,
    assert_holds,
    ct_config,
    ct_tensors,
    default_layers,
    dequantized,
    make_layer,
    make_sparse,
    read_all,
    snapshot,
    write_checkpoint,
    write_tensors,
)
from damage import (
    CHANGES,
    Damage,
    assert_changes_are_noticed,
    assert_refused,
    poke,
    put,
    remove,
    several,
    sharded,
    tensors,
    text,
    truncate,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert_24 import stored_weight
from torch import Tensor

from marlin import load
from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

UP, DOWN = "model.layers.0.up", "model.layers.0.down"
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
    before = snapshot(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches == []
    assert snapshot(tmp_path / "src") == before
    assert report.source_format == "compressed-tensors"
    assert [layer.zeros for layer in report.layers] == [not sym] * 2
    assert [layer.act_order for layer in report.layers] == [ordered and group_size != -1, False]
    assert [layer.dtype for layer in report.layers] == ["float16", "bfloat16"]
    assert not any(layer.sparse for layer in report.layers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    k=st.integers(1, 320),
    n=st.integers(1, 150),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    sym=st.booleans(),
    act_order=st.booleans(),
    shard_bytes=st.integers(1, 20_000),
)
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    k: int,
    n: int,
    group_size: int,
    sym: bool,
    act_order: bool,
    shard_bytes: int,
) -> None:
    root = tmp_path_factory.mktemp("any")
    layers = {"m.x": make_layer(k, n, group_size, sym=sym, act_order=act_order)}
    config = ct_config(group_size, symmetric=sym, actorder="group" if act_order else None)
    make = partial(
        ct_tensors, zeros="none" if sym else "packed", order="always" if act_order else "never"
    )
    source = write_checkpoint(root / "src", layers, config=config, tensors_of=make)
    convert(root / "src", root / "dst", progress=False, shard_bytes=shard_bytes)
    assert_holds(root / "dst", source)
    assert verify(root / "dst", root / "src", progress=False).equal


@pytest.mark.parametrize("actorder", ["group", "weight", None])
def test_an_order_that_is_not_set(tmp_path: Path, actorder: str | None) -> None:
    make = partial(ct_tensors, zeros="none", order="unset")
    source = write_checkpoint(
        tmp_path / "src", config=ct_config(actorder=actorder), tensors_of=make
    )
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal


def test_logits_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", config=ct_config(), tensors_of=no_zeros)
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    with torch.device("meta"):
        model = Tiny()
    load(model, tmp_path / "dst")
    assert model.head.weight is model.model.embed.weight
    tokens = torch.arange(50)
    with torch.no_grad():
        got = model(tokens, torch.float16)
        want = dequantized(source)(tokens, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))


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
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    assert_holds(tmp_path / "dst", source)
    assert verify(tmp_path / "dst", tmp_path / "src", progress=False).equal


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
    convert(tmp_path / "src", tmp_path / "dst", progress=False)
    changed = read_all(tmp_path / "src")
    change(changed[f"a.b.{leaf}"])
    write_tensors(tmp_path / "src", changed)
    (mismatch,) = verify(tmp_path / "dst", tmp_path / "src", progress=False).mismatches
    assert re.match(rf"a\.b: {says}", mismatch), mismatch


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


def config(**changes: Any) -> Damage:
    return text("config.json", json.dumps(ct_config(**changes)))


def add(name: str, tensor: Tensor) -> Damage:
    return tensors(lambda found: found.update({name: tensor}))


SHUFFLED = torch.arange(64, dtype=torch.int32).flip(0) // 32
ALL_G_IDX = tensors(
    lambda found: found.update(
        {
            name.replace("weight_packed", "weight_g_idx"): torch.arange(8 * t.size(1)) // 32
            for name, t in list(found.items())
            if name.endswith("weight_packed")
        }
    )
)
CASES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate(-3000), "is truncated: its header needs"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    "no config": (remove("config.json"), "config.json cannot be read"),
    # the configuration
    "8 bits": (config(num_bits=8), r"config_groups\.group_0\.weights\.num_bits: got 8"),
    "floats": (config(type="float"), "weights.type: got 'float'"),
    "int-quantized": (config(format="int-quantized"), "format: got 'int-quantized' .8-bit"),
    "float-quantized": (config(format="float-quantized"), "format: got 'float-quantized'"),
    "nvfp4": (config(format="nvfp4-pack-quantized"), "4-bit floats, not integers"),
    "no format": (config(format=None), "format: got None"),
    "activations": (config(input_activations={"num_bits": 8}), "input_activations: got quantised"),
    "cache": (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: got a quantised cache"),
    "no groups": (config(config_groups={}), "config_groups: got {}"),
    "tensor strategy": (config(strategy="tensor"), "strategy: got 'tensor'"),
    "group size 16": (config(group_size=16), "group_size: got 16; it must be 32, 64 or 128"),
    "broken target": (config(targets=["re:("]), "targets: got 're:.'; not a regular expression"),
    "ignored but quantized": (
        config(ignore=["re:.*up"]),
        r"0\.up: the config's ignore names it, but it has weight_",
    ),
    "no target": (
        config(targets=["re:.*down"]),
        r"0\.up: no target of the config's config_groups matches it, but it has",
    ),
    "another group size": (
        config(group_size=64),
        r"0\.up: weight_scale: got 2 groups for in_features=64; with group_size 64 of "
        r"config_groups\.group_0 there must be 1",
    ),
    "channel": (config(strategy="channel"), r"with strategy channel of .* there must be 1"),
    "said to be asymmetric": (
        config(symmetric=False),
        r"0\.up: weight_zero_point is missing \(format pack-quantized of config_groups\.group_0",
    ),
    "said to be symmetric": (
        add(f"{UP}.weight_zero_point", torch.full((12, 2), 0x77777777, dtype=torch.int32)),
        r"0\.up: zero points: got 7 in group 0, column 0; with symmetric: true in the config",
    ),
    "order missing": (config(actorder="group"), r"0\.up: weight_g_idx is missing"),
    "order missing, by its alias": (config(actorder="dynamic"), r"weight_g_idx is missing"),
    "order not in the config": (
        add(f"{UP}.weight_g_idx", SHUFFLED),
        r"0\.up: weight_g_idx: got features out of the order .* actorder 'group'",
    ),
    "said to be marlin-24": (
        config(format="marlin-24", group_size=128),
        r"0\.up: weight_scale beside weight_packed.*0\.up: scale_packed is missing",
    ),
    # the layers
    "weight missing": (tensors(lambda t: t.pop(f"{UP}.weight_packed")), "weight_packed is missing"),
    "scale missing": (tensors(lambda t: t.pop(f"{UP}.weight_scale")), "weight_scale is missing"),
    "shape missing": (tensors(lambda t: t.pop(f"{UP}.weight_shape")), "weight_shape is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layers" in k]),
        r"no quantized layer: no tensor is called <module>\.weight_packed",
    ),
    "quantized activations": (
        add(f"{UP}.input_scale", torch.ones(1)),
        r"0\.up: input_scale beside weight_packed, weight_scale, weight_shape: a quantized",
    ),
    "weight beside": (add(f"{UP}.weight", torch.zeros(2)), r"0\.up: weight beside"),
    "8-bit floats": (
        several(add("q.weight", torch.ones(8, 8)), add("q.weight_scale", torch.ones(8, 1))),
        "q: weight beside weight_scale",
    ),
    "no module name": (add("weight_packed", torch.zeros(2)), "belong to no named module"),
    "shape of another layer": (
        add(f"{UP}.weight_shape", torch.tensor([64, 96])),
        r"0\.up: weight_packed: got int32 \[96, 8\]; weight_shape \(64, 96\)",
    ),
    "shape of 3": (add(f"{UP}.weight_shape", torch.tensor([1, 96, 64])), "two positive integers"),
    "shape negative": (add(f"{UP}.weight_shape", torch.tensor([-96, -64])), "two positive"),
    "shape huge": (add(f"{UP}.weight_shape", torch.tensor([2**62, 2**62])), "weight_packed: got"),
    "shape float": (put(f"{UP}.weight_shape", Tensor.float), "weight_shape: got float32"),
    "weight int64": (put(f"{UP}.weight_packed", Tensor.long), "weight_packed: got int64"),
    "weight flat": (put(f"{UP}.weight_packed", Tensor.flatten), r"got int32 \[768\]"),
    "8-bit words": (put(f"{UP}.weight_packed", lambda t: t.repeat(1, 2)), "twice the words"),
    "scales row lost": (put(f"{UP}.weight_scale", lambda t: t[:-1]), r"must be \[96, groups\]"),
    "group lost": (put(f"{UP}.weight_scale", lambda t: t[:, :1]), "got 1 groups .*must be 2"),
    "scales int": (put(f"{UP}.weight_scale", Tensor.int), "weight_scale: got int32"),
    "zeros of another shape": (
        add(f"{UP}.weight_zero_point", torch.zeros(2, 12, dtype=torch.int32)),
        r"weight_zero_point: got int32 \[2, 12\]; it must be int32 \[12, 2\]",
    ),
    "zeros of 8 bits": (
        add(f"{UP}.weight_zero_point", torch.full((96, 2), 100, dtype=torch.int8)),
        r"weight_zero_point: got int8 values 100\.\.100",
    ),
    "order of another length": (
        add(f"{UP}.weight_g_idx", SHUFFLED[:-1].clone()),
        r"weight_g_idx: got int32 \[63\]; it must be integers \[64\]",
    ),
    "order unbalanced": (
        several(ALL_G_IDX, config(actorder="group"), poke(f"{UP}.weight_g_idx", (0,), 1)),
        "0.up: g_idx puts 31 features into group 0",
    ),
    "order out of range": (
        several(ALL_G_IDX, config(actorder="group"), poke(f"{UP}.weight_g_idx", (7,), 2)),
        r"0.up: g_idx\[7\] is 2, want a group in 0\.\.1",
    ),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"0\.down: bias: got float16 \[63\]"),
    "scale NaN": (poke(f"{UP}.weight_scale", (3, 1), float("nan")), "weight_scale: got nan at"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("valid") / "src"
    return write_checkpoint(root, config=ct_config(), tensors_of=no_zeros).directory


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, valid: Path, case: str) -> None:
    assert_refused(tmp_path, valid, *CASES[case])


def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(valid, source)

    def change(found: dict[str, Tensor]) -> None:
        found[f"{UP}.weight_scale"][3, 1] = float("nan")
        found[f"{DOWN}.bias"][0] = float("nan")
        found.pop("model.layers.1.up.weight_scale")

    tensors(change)(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "dst", progress=False)
    names = [text.split(":")[0] for text in sorted(caught.value.refusals)]
    assert names == sorted(default_layers())


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**CHANGES)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, valid: Path, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), valid, **change)
