"""compressed-tensors settings: what is read from them, and a reason for each refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from marlin import CheckpointError
from marlin.formats.compressed_tensors import parse_compressed_tensors_config

CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "actorder": None,
                "dynamic": False,
            },
        }
    },
    "ignore": ["lm_head"],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """CONFIG with one value replaced; a path that starts with ``.`` is inside the group."""
    config = copy.deepcopy(CONFIG)
    at: Any = config["config_groups"]["group_0"] if path.startswith(".") else config
    *parents, last = path.strip(".").split(".")
    for parent in parents:
        at = at[parent]
    at[last] = value
    return config


def test_config() -> None:
    found = parse_compressed_tensors_config(CONFIG)
    (group,) = found.groups
    assert (group.name, group.group_size, group.symmetric) == ("group_0", 128, True)
    assert group.actorder is None
    assert found.group_of("model.layers.0.q_proj") is group
    assert found.group_of("lm_head") is None


def test_config_strategies() -> None:
    channel = changed(".weights.strategy", "channel")
    channel["config_groups"]["group_0"]["weights"]["group_size"] = None
    assert parse_compressed_tensors_config(channel).groups[0].group_size == -1
    inferred = changed(".weights.strategy", None)
    assert parse_compressed_tensors_config(inferred).groups[0].group_size == 128
    inferred["config_groups"]["group_0"]["weights"]["group_size"] = -1
    assert parse_compressed_tensors_config(inferred).groups[0].group_size == -1
    for order in ("group", "weight", "static", False):
        group = parse_compressed_tensors_config(changed(".weights.actorder", order)).groups[0]
        assert group.actorder == (order or None)
    assert (
        not parse_compressed_tensors_config(changed(".weights.symmetric", False))
        .groups[0]
        .symmetric
    )


def test_config_targets() -> None:
    config = copy.deepcopy(CONFIG)
    config["ignore"] = ["re:.*gate$", "model.embed"]
    other = copy.deepcopy(config["config_groups"]["group_0"])
    other["targets"] = ["re:.*down_proj", "model.head"]
    other["weights"]["group_size"] = 32
    config["config_groups"]["group_1"] = other
    exact = copy.deepcopy(other)
    exact["targets"] = ["b.down_proj"]
    exact["weights"]["group_size"] = 64
    config["config_groups"]["group_2"] = exact
    found = parse_compressed_tensors_config(config)
    assert found.ignores("a.gate")
    assert not found.ignores("a.gate_proj")
    sizes = {name: group and group.group_size for name in
             ("a.q_proj", "a.down_proj", "b.down_proj", "model.head", "model.heads", "a.gate",
              "model.embed")
             for group in [found.group_of(name)]}  # fmt: skip
    assert sizes == {"a.q_proj": 128, "a.down_proj": 32, "b.down_proj": 64, "model.head": 32,
                     "model.heads": 128, "a.gate": None, "model.embed": None}  # fmt: skip


def test_config_formats() -> None:
    config = changed("format", "marlin-24")
    assert parse_compressed_tensors_config(config).groups[0].format == "marlin-24"
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert parse_compressed_tensors_config(config).groups[0].format == "pack-quantized"
    config["format"] = "mixed-precision"
    assert parse_compressed_tensors_config(config).groups[0].format == "pack-quantized"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("group_size", 64, "weights.group_size: got 64; 'marlin-24' has groups of 128"),
        ("symmetric", False, "weights.symmetric: got false; 'marlin-24' stores no zero points"),
        ("actorder", "group", "weights.actorder: got 'group'; 'marlin-24' stores no order"),
    ],
)
def test_what_the_sparse_format_cannot_hold(key: str, value: Any, reason: str) -> None:
    config = changed(f".weights.{key}", value)
    parse_compressed_tensors_config(config)
    config["format"] = "marlin-24"
    with pytest.raises(CheckpointError) as caught:
        parse_compressed_tensors_config(config)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("quant_method", "gptq", ("quant_method: got 'gptq'",)),
        ("format", "mixed-precision", ("not every one names its own",)),
        ("format", "float-quantized", ("format: got 'float-quantized' (8-bit floats)",)),
        ("format", "int-quantized", ("format: got 'int-quantized' (8-bit integers",)),
        ("format", "naive-quantized", ("format: got 'naive-quantized'",)),
        ("format", "nvfp4-pack-quantized", ("4-bit floats, not integers",)),
        ("format", "dense", ("not compressed",)),
        ("format", "future", ("format: got 'future' (not known here)",)),
        ("format", None, ("format: got None",)),
        (".format", "int-quantized", ("config_groups.group_0.format: got 'int-quantized'",)),
        (".weights.num_bits", 8, ("config_groups.group_0.weights.num_bits: got 8", "4-bit")),
        (".weights.num_bits", None, ("num_bits: got None",)),
        (".weights.type", "float", ("weights.type: got 'float'",)),
        (".weights.strategy", "tensor", ("strategy: got 'tensor' (one scale for the whole",)),
        (".weights.strategy", "block", ("strategy: got 'block' (one scale per 2-D block)",)),
        (".weights.strategy", "tensor_group", ("strategy: got 'tensor_group'",)),
        (".weights.strategy", 5, ("strategy: got 5 (not known here)",)),
        (".weights.group_size", 256, ("weights.group_size: got 256", "32, 64 or 128")),
        (".weights.group_size", [], ("weights.group_size: got []",)),
        (".weights.dynamic", True, ("weights.dynamic: got True", "must be stored")),
        (".weights.symmetric", "no", ("weights.symmetric: got 'no'",)),
        (".weights.actorder", "magic", ("weights.actorder: got 'magic'",)),
        (".weights", None, ("group_0.weights: got None",)),
        (".input_activations", {"num_bits": 8}, ("group_0.input_activations:", "W4A16")),
        (".output_activations", {"num_bits": 8}, ("group_0.output_activations:",)),
        (".targets", "Linear", ("group_0.targets: got 'Linear'", "list")),
        (".targets", [3], ("group_0.targets: got 3",)),
        (".targets", ["re:("], ("group_0.targets: got 're:('", "regular expression")),
        ("config_groups", {}, ("config_groups: got {}",)),
        ("config_groups", None, ("config_groups: got None",)),
        ("config_groups", {"W4A16": ["Linear"]}, ("config_groups.W4A16: got ['Linear']", "preset")),
        ("ignore", "lm_head", ("ignore: got 'lm_head'",)),
        ("kv_cache_scheme", {"num_bits": 8}, ("kv_cache_scheme:", "W4A16", "no kv_cache_scheme")),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, ("sparsity_config:", "twice")),
        ("transform_config", {"config_groups": {"u": {}}}, ("transform_config:", "QuIP")),
    ],
)  # fmt: skip
def test_refused_settings(path: str, value: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_compressed_tensors_config(changed(path, value))
    assert len(caught.value.refusals) == 1
    for part in ("compressed-tensors quantization_config: ", *parts):
        assert part in str(caught.value)


def test_settings_that_change_nothing_are_accepted() -> None:
    for path, value in (("sparsity_config", {}), ("sparsity_config", {"format": "dense"}),
                        ("transform_config", {}), ("ignore", None)):  # fmt: skip
        parse_compressed_tensors_config(changed(path, value))
