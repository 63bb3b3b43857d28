"""Which compressed-tensors settings can be read, and a reason for each one that cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marlin.formats.checkpoint import CheckpointError
from marlin.formats.packed import GROUP_SIZES

PACKED, SPARSE = "pack-quantized", "marlin-24"  # the formats that are read
SPARSE_GROUP = 128  # the one size of groups in marlin-24
OTHER_FORMATS = {
    "dense": "its weights are not compressed",
    "fakequant": "its weights are stored unquantised",
    "sparse-bitmask": "sparse without quantisation",
    "sparse-24-bitmask": "2:4 sparse without 4-bit codes",
    "int-quantized": "8-bit integers, unpacked",
    "float-quantized": "8-bit floats",
    "naive-quantized": "one byte per weight",
    "mixed-precision": "its groups differ in format, and not every one names its own",
    "nvfp4-pack-quantized": "4-bit floats, not integers",
    "mxfp4-pack-quantized": "4-bit floats, not integers",
    "mxfp6-pack-quantized": "6-bit floats",
    "mxfp8-quantized": "8-bit floats",
}
OTHER_STRATEGIES = {
    "tensor": "one scale for the whole weight",
    "block": "one scale per 2-D block",
    "token": "for activations",
    "tensor_group": "two levels of scales",
    "attn_head": "for attention",
}
AGAIN = "quantise the model again with a W4A16 scheme"


@dataclass(frozen=True)
class WeightGroup:
    """An entry of ``config_groups``: how its targets were quantised. ``group_size`` -1: channel.

    ``format``: ``pack-quantized``, or ``marlin-24``, which is 2:4 sparse.
    """

    name: str
    group_size: int
    symmetric: bool
    actorder: str | None
    targets: tuple[str, ...]
    format: str = PACKED

    @property
    def stores_order(self) -> bool:
        """Whether the features of its layers are in another order than their groups."""
        return self.actorder in ("group", "dynamic")  # "dynamic" is an alias


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """The settings of a checkpoint: every group is 4-bit integer and weight-only."""

    groups: tuple[WeightGroup, ...]
    ignore: tuple[str, ...]

    def group_of(self, module: str) -> WeightGroup | None:
        """The group that the linear layer named ``module`` belongs to; None: left unquantised.

        A target or ignored name is an exact name, ``re:`` and a regular expression matched from
        the start of the name, or the class name ``Linear``. An exact name wins over an expression,
        and that over the class.
        """
        if self.ignores(module):
            return None
        found = (
            *(group for group in self.groups if module in group.targets),
            *(group for group in self.groups if any(_matches(module, t) for t in group.targets)),
            *(group for group in self.groups if "Linear" in group.targets),
        )
        return found[0] if found else None

    def ignores(self, module: str) -> bool:
        """Whether ``ignore`` names the module."""
        return any(_matches(module, pattern) for pattern in self.ignore)


def parse_compressed_tensors_config(config: Mapping[str, Any]) -> CompressedTensorsConfig:
    """Read the ``quantization_config`` of a ``config.json``.

    Raises:
        CheckpointError: listing every setting that is malformed or not supported, by name.
    """
    problems: list[str] = []
    method = config.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        problems.append(
            f"quant_method: got {method!r}; this reader takes 'compressed-tensors' only"
        )
    _check_extras(config, problems)
    entries = config.get("config_groups")
    outer = config.get("format")
    each_has_its_own = isinstance(entries, Mapping) and all(
        isinstance(scheme, Mapping) and scheme.get("format") for scheme in entries.values()
    )
    if not (outer == "mixed-precision" and each_has_its_own):
        _check_format(outer, "format", problems)
    groups = []
    if not isinstance(entries, Mapping) or not entries:
        problems.append(
            f"config_groups: got {entries!r}; it must map names to schemes; is this a quantised "
            "checkpoint?"
        )
    else:
        for name, scheme in entries.items():
            group = _read_group(f"config_groups.{name}", name, scheme, outer, problems)
            if group is not None:
                groups.append(group)
    ignore = _read_patterns(config.get("ignore") or (), "ignore", problems)
    if problems:
        raise CheckpointError(problems, where="compressed-tensors quantization_config")
    return CompressedTensorsConfig(tuple(groups), ignore)


def _check_format(value: Any, where: str, problems: list[str]) -> None:
    if value not in (PACKED, SPARSE):
        reason = OTHER_FORMATS.get(str(value), "not known here")
        problems.append(
            f"{where}: got {value!r} ({reason}); only {PACKED!r} and {SPARSE!r} are read; {AGAIN}"
        )


def _check_extras(config: Mapping[str, Any], problems: list[str]) -> None:
    """Refuse settings that change what a layer computes and that the tensors do not show."""
    sparsity = config.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
    if sparse != "dense":
        problems.append(
            f"sparsity_config: got format {sparse!r}; its weights are compressed twice; save the "
            "model without sparse compression"
        )
    transform = config.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        problems.append(
            "transform_config: got online transforms of the activations (as QuIP and SpinQuant "
            f"use); a linear layer alone does not apply them; {AGAIN} and no transforms"
        )
    if config.get("kv_cache_scheme") is not None:
        problems.append(
            "kv_cache_scheme: got a quantised cache of keys and values, which linear layers know "
            f"nothing of; {AGAIN} and no kv_cache_scheme"
        )


def _read_group(
    where: str, name: str, scheme: Any, outer_format: Any, problems: list[str]
) -> WeightGroup | None:
    if not isinstance(scheme, Mapping):
        problems.append(
            f"{where}: got {scheme!r}; it must be a scheme with weights and targets (a preset's "
            "name is written out when a model is saved); save the model again"
        )
        return None
    if scheme.get("format") is not None:
        _check_format(scheme["format"], f"{where}.format", problems)
    for side in ("input_activations", "output_activations"):
        if scheme.get(side) is not None:
            problems.append(
                f"{where}.{side}: got quantised activations; the kernels compute in float16 or "
                f"bfloat16; {AGAIN}"
            )
    targets = _read_patterns(scheme.get("targets") or (), f"{where}.targets", problems)
    weights = scheme.get("weights")
    if not isinstance(weights, Mapping):
        problems.append(f"{where}.weights: got {weights!r}; the weights must be quantised; {AGAIN}")
        return None
    group = _read_weights(f"{where}.weights", name, weights, targets, problems)
    if (scheme.get("format") or outer_format) != SPARSE:
        return group
    _check_sparse(f"{where}.weights", group, problems)
    return replace(group, format=SPARSE)


def _check_sparse(where: str, group: WeightGroup, problems: list[str]) -> None:
    """Refuse what ``marlin-24`` has no place for: its writer would have lost it."""
    if group.group_size not in (-1, SPARSE_GROUP):
        problems.append(
            f"{where}.group_size: got {group.group_size}; {SPARSE!r} has groups of {SPARSE_GROUP} "
            f"or strategy 'channel'; correct the config, or save the model as {PACKED!r}"
        )
    if not group.symmetric:
        problems.append(
            f"{where}.symmetric: got false; {SPARSE!r} stores no zero points; save the model as "
            f"{PACKED!r}"
        )
    if group.stores_order:
        problems.append(
            f"{where}.actorder: got {group.actorder!r}; {SPARSE!r} stores no order; save the model "
            f"as {PACKED!r}"
        )


def _read_weights(
    where: str, name: str, weights: Mapping[str, Any], targets: tuple[str, ...], problems: list[str]
) -> WeightGroup:
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if type(bits) is not int or bits != 4:
        problems.append(f"{where}.num_bits: got {bits!r}; only 4-bit weights are read; {AGAIN}")
    if kind != "int":
        problems.append(f"{where}.type: got {kind!r}; only 'int' is read; {AGAIN}")
    if weights.get("dynamic", False) is not False:
        problems.append(
            f"{where}.dynamic: got {weights['dynamic']!r}; scales must be stored; {AGAIN}"
        )
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:  # the rule by which compressed-tensors infers it
        grouped = type(group_size) is int and group_size > 0
        strategy = "group" if grouped else "channel" if group_size == -1 else "tensor"
    if strategy == "channel":
        group_size = -1
    elif strategy != "group":
        reason = OTHER_STRATEGIES.get(str(strategy), "not known here")
        problems.append(
            f"{where}.strategy: got {strategy!r} ({reason}); only 'group' and 'channel' are read; "
            f"{AGAIN}"
        )
    elif group_size not in GROUP_SIZES:
        problems.append(
            f"{where}.group_size: got {group_size!r}; it must be 32, 64 or 128; {AGAIN} and one of "
            "these"
        )
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        problems.append(f"{where}.symmetric: got {symmetric!r}; it must be true or false")
    order = weights.get("actorder") or None
    if order not in (None, "group", "weight", "static", "dynamic"):
        problems.append(f"{where}.actorder: got {order!r}; it must be null, 'group' or 'weight'")
    size = group_size if type(group_size) is int else -1
    return WeightGroup(name, size, symmetric is True, order, targets)


def _read_patterns(patterns: Any, where: str, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        problems.append(f"{where}: got {patterns!r}; it must be a list of names")
        return ()
    for pattern in patterns:
        if not isinstance(pattern, str):
            problems.append(f"{where}: got {pattern!r}; it must be a name")
            return ()
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                problems.append(f"{where}: got {pattern!r}; not a regular expression: {error}")
                return ()
    return tuple(patterns)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module
