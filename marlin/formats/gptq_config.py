"""The settings of a GPTQ checkpoint: how each module was quantized, and what cannot be read.

Two places hold them: ``quantization_config`` inside ``config.json`` and, older,
``quantize_config.json``. Key names and the meaning of ``dynamic`` follow GPTQModel
(gptqmodel/quantization/config.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marlin.formats.checkpoint import CheckpointError

GROUP_SIZES = (-1, 32, 64, 128)
ALIASES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "quant_method": ("quant_method",),
    "pack_dtype": ("pack_dtype",),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "dynamic": ("dynamic",),
    "lm_head": ("lm_head",),
    "is_marlin_format": ("is_marlin_format",),
    "format_version": ("format_version",),
}
OTHER_FORMATS = {
    "gptq_p": "the planar packing of GPTQModel",
    "marlin": "the packing of the original Marlin kernel",
    "marlin_24": "the packing of Sparse-Marlin",
    "bitblas": "the packing of BitBLAS",
    "exl": "an ExLlama packing",
    "exl2": "the EXL2 packing of ExLlamaV2",
    "exl3": "the EXL3 packing of ExLlamaV3",
    "gguf": "a llama.cpp packing",
    "qqq": "the W4A8 packing of QQQ",
    "gemm": "an AWQ packing",
    "gemv": "an AWQ packing",
    "gemv_fast": "an AWQ packing",
    "llm-awq": "an AWQ packing",
}
OTHER_METHODS = {
    "awq": "which belongs into quantization_config in config.json",
    "marlin": OTHER_FORMATS["marlin"],  # without a format_version, which this package's own has
    "compressed-tensors": "which belongs into quantization_config in config.json",
}


@dataclass(frozen=True)
class GptqSettings:
    """How one module was quantized to 4 bits.

    ``sym``: True claims that every zero point is 8, False that it need not be, None that the config
    is silent. ``zeros_version``: 1 stores a zero point minus one, 2 stores it as it is.
    ``zeros_carry``: in version 1 the one is to be added to whole 32-bit words, carrying from nibble
    to nibble, as the tool that wrote them subtracted it.
    """

    group_size: int = 128
    sym: bool | None = None
    zeros_version: int = 1
    zeros_carry: bool = False


@dataclass(frozen=True)
class _Rule:
    key: str
    pattern: re.Pattern[str]
    excluded: bool
    overrides: dict[str, Any]


def _normalized(source: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """The known keys of a config under their canonical names; null means absent."""
    values: dict[str, Any] = {}
    for key, aliases in ALIASES.items():
        given = {alias: source[alias] for alias in aliases if source.get(alias) is not None}
        if not given:
            continue
        (first, value), *others = given.items()
        problems += [
            f"{where}: {first} is {value!r} but its alias {alias} is {other!r}"
            for alias, other in others
            if other != value
        ]
        values[key] = value
    return values


def _settings(values: Mapping[str, Any], carry: bool, where: str) -> tuple[GptqSettings, list[str]]:
    """The settings in a normalized config, and why they cannot be read."""
    problems: list[str] = []
    bits, group_size, sym = values.get("bits"), values.get("group_size"), values.get("sym")
    if type(bits) is not int or bits != 4:
        problems.append(f"{where}: bits is {bits!r}; only 4-bit weights are supported")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        problems.append(
            f"{where}: group_size is {group_size!r}; supported are "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
        group_size = -1
    if sym is not None and not isinstance(sym, bool):
        problems.append(f"{where}: sym is {sym!r}, not true or false")
        sym = None
    method = values.get("quant_method", "gptq")
    if method != "gptq":
        reason = (
            OTHER_METHODS.get(method, "unknown here") if isinstance(method, str) else "not a name"
        )
        if method == "marlin" and "format_version" in values:
            reason = "it is in this package's own format already"
        problems.append(f"{where}: quant_method is {method!r} ({reason}); gptq is read here")
    packing = values.get("checkpoint_format", "gptq")
    if packing not in ("gptq", "gptq_v2"):
        reason = (
            OTHER_FORMATS.get(packing, "unknown here") if isinstance(packing, str) else "not a name"
        )
        problems.append(
            f"{where}: checkpoint_format is {packing!r} ({reason}); only gptq and gptq_v2 are "
            "converted: quantize or save the model again in one of them"
        )
    if values.get("is_marlin_format", False) is not False:
        problems.append(
            f"{where}: is_marlin_format is {values['is_marlin_format']!r} "
            f"({OTHER_FORMATS['marlin']}); it must be true or false"
        )
    pack_dtype = values.get("pack_dtype", "int32")
    if pack_dtype not in ("int32", "torch.int32"):
        problems.append(f"{where}: pack_dtype is {pack_dtype!r}; only int32 words are supported")
    version = 2 if packing == "gptq_v2" else 1
    return GptqSettings(group_size, sym, version, carry), problems


class GptqConfig:
    """The parsed settings of a checkpoint; :meth:`settings` resolves them for one module."""

    def __init__(self, values: dict[str, Any], rules: list[_Rule], carry: bool, where: str) -> None:
        self._values, self._rules, self._carry, self._where = values, rules, carry, where

    def settings(self, module: str) -> GptqSettings | None:
        """The settings of a module, or None when ``dynamic`` leaves it unquantized.

        The first rule that matches the start of the name wins; excluding rules come first. Raises
        :class:`CheckpointError` when the module's own settings cannot be read.
        """
        for rule in self._rules:
            if rule.pattern.match(module):
                if rule.excluded:
                    return None
                values = {**self._values, **rule.overrides}
                where = f"{self._where}: dynamic[{rule.key!r}] for {module}"
                settings, problems = _settings(values, self._carry, where)
                if problems:
                    raise CheckpointError(problems)
                return settings
        return _settings(self._values, self._carry, self._where)[0]


def _rules(dynamic: Any, where: str, problems: list[str]) -> list[_Rule]:
    if dynamic is None:
        return []
    if not isinstance(dynamic, Mapping):
        problems.append(f"{where}: dynamic is {dynamic!r}, not a map from patterns to overrides")
        return []
    rules: list[_Rule] = []
    for key, overrides in dynamic.items():
        excluded = key.startswith("-:")
        label = f"{where}: dynamic[{key!r}]"
        try:
            pattern = re.compile(key[2:] if key[:2] in ("-:", "+:") else key)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{label}: not a valid regular expression: {error}")
            continue
        if not excluded and not isinstance(overrides, Mapping):
            problems.append(f"{label}: its overrides are {overrides!r}, not a map")
            continue
        values = {} if excluded else _normalized(overrides, label, problems)
        rules.append(_Rule(key, pattern, excluded, values))
    return sorted(rules, key=lambda rule: not rule.excluded)  # stable: excluding rules first


def _sources(
    config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """The places that hold settings, with their names."""
    sources: list[tuple[str, Mapping[str, Any]]] = []
    inner = config.get("quantization_config")
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"config.json: quantization_config is {inner!r}, not an object")
        sources.append(("config.json: quantization_config", inner))
    if quantize_config is not None:
        sources.append(("quantize_config.json", quantize_config))
    if not sources:
        raise CheckpointError(
            "config.json has no quantization_config and there is no quantize_config.json: not a "
            "quantized checkpoint"
        )
    return sources


def merged_settings(
    config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str, list[str]]:
    """The settings of both places under their canonical names, how messages call the place, and
    what is wrong: aliases and places that disagree.

    Raises :class:`CheckpointError` when there are none.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    sources = _sources(config, quantize_config)
    for where, source in sources:
        found = _normalized(source, where, problems)
        if "quant_method" not in found and ("zero_point" in source or "version" in source):
            problems.append(
                f"{where}: zero_point and version are AWQ's keys, but there is no quant_method; if "
                "this is an AWQ checkpoint, set quant_method to 'awq' in config.json's "
                "quantization_config"
            )
        problems += [
            f"config.json and quantize_config.json disagree on {key}: {values[key]!r} and {value!r}"
            for key, value in found.items()
            if key in values and values[key] != value
        ]
        values = {**found, **values}
    return values, sources[0][0], problems


def parse_gptq_config(
    config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None = None
) -> GptqConfig:
    """Parse ``config.json`` and, when there is one, ``quantize_config.json``.

    Raises :class:`CheckpointError` listing every setting that is missing, malformed, unsupported,
    or different in the two places.
    """
    values, where, problems = merged_settings(config, quantize_config)
    carry = any(_written_by_gptqmodel(source) for _, source in _sources(config, quantize_config))
    problems += _settings(values, carry, where)[1]
    rules = _rules(values.get("dynamic"), where, problems)
    if problems:
        raise CheckpointError(problems)
    return GptqConfig(values, rules, carry, where)


def _written_by_gptqmodel(source: Mapping[str, Any]) -> bool:
    """GPTQModel makes version 1 zeros by subtracting 0x11111111 from each word, borrows included,
    and reads them by adding it back (gptqmodel/utils/model.py,
    convert_gptq_v1_to_v2_format_module); other tools work per nibble.
    """
    meta = source.get("meta")
    return isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer", "")).lower()
