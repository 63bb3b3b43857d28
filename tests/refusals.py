"""What damages a checkpoint of each format so that it must be refused, and for which reason.

GPTQ, and what can be wrong with the files of any format: tests/test_hostile_checkpoints.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import Source, awq_config, awq_tensors, ct_config, ct_tensors, write_checkpoint
from damage import Damage, poke, put, remove, several, sharded, tensors, text, truncate
from test_convert_marlin_24 import config_24, write_sparse
from test_convert_original_marlin import marlin_config, write_marlin
from test_convert_sparse_marlin import sparse_marlin_config, write_sparse_marlin
from torch import Tensor

Cases = dict[str, tuple[Damage, str]]
UP, DOWN = "model.layers.0.up", "model.layers.0.down"


def configured(make: Callable[..., dict[str, Any]]) -> Callable[..., Damage]:
    """The damage that is another ``config.json``, as ``make`` has it."""
    return lambda **changes: text("config.json", json.dumps(make(**changes)))


def add(name: str, tensor: Tensor) -> Damage:
    return tensors(lambda found: found.update({name: tensor}))


awq = configured(awq_config)
OLDER = {"zero_point": True, "q_group_size": 64, "w_bit": 4}
AWQ: Cases = {
    "truncated": (truncate(-3000), "is truncated: its header needs"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    "no config": (remove("config.json"), "config.json cannot be read"),
    # the configuration
    "8 bits": (awq(bits=8), "bits: got 8; only 4-bit"),
    "bits as text": (awq(bits="4"), "bits: got '4'"),
    "no bits": (awq(bits=None), "bits: got None"),
    "no group size": (awq(group_size=None), "group_size: got None"),
    "group size 16": (awq(group_size=16), "group_size: got 16; it must be -1, 32, 64 or 128"),
    "gemv": (awq(version="gemv"), "version: got 'gemv'.*only 'gemm' is read"),
    "gemv_fast": (awq(version="GEMV_FAST"), "version: got 'GEMV_FAST' .16-bit words"),
    "version 1": (awq(version=1), "version: got 1"),
    "format of another tool": (awq(format="gemv"), "format: got 'gemv'"),
    "pack dtype": (awq(pack_dtype="int16"), "pack_dtype: got 'int16'; only int32"),
    "dynamic": (awq(dynamic={".*": {"bits": 8}}), "dynamic: got settings of single modules"),
    "zero point as text": (awq(zero_point="yes"), "zero_point: got 'yes'"),
    "not a list": (awq(modules_to_not_convert="lm_head"), "modules_to_not_convert: got 'lm"),
    "not names": (awq(modules_to_not_convert=[3]), r"modules_to_not_convert: got \[3\]"),
    "two configs disagree": (
        text("quant_config.json", json.dumps(OLDER)),
        "config.json and quant_config.json disagree on group_size: 32 and 64",
    ),
    "second config of another tool": (
        text("quantize_config.json", json.dumps({**OLDER, "quant_method": "gptq"})),
        "quant_method: got 'gptq'",
    ),
    "second config broken": (text("quant_config.json", "[]"), "quant_config.json holds a JSON"),
    "excluded but quantized": (
        awq(modules_to_not_convert=["layers.0"]),
        r"0\.up: modules_to_not_convert has 'layers\.0', but the layer has",
    ),
    "said to be symmetric": (
        several(awq(zero_point=False), poke(f"{UP}.qzeros", (1, 2), 0x77777777)),
        r"0\.up: zero points: got 7 in group 1, column 16; with zero_point: false",
    ),
    "another group size": (
        awq(group_size=64),
        r"0\.up: scales: got 2 groups for in_features=64; with group_size 64 .*must be 1",
    ),
    # the layers
    "qweight missing": (tensors(lambda t: t.pop(f"{UP}.qweight")), r"0\.up: qweight is missing"),
    "qzeros missing": (tensors(lambda t: t.pop(f"{UP}.qzeros")), r"0\.up: qzeros is missing"),
    "scales missing": (tensors(lambda t: t.pop(f"{UP}.scales")), r"0\.up: scales is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layers" in k]),
        "no quantized layer.*format awq",
    ),
    "gptq tensors": (
        add(f"{UP}.g_idx", torch.zeros(64, dtype=torch.int32)),
        r"0\.up: g_idx beside qweight, qzeros: a quantized linear layer has only",
    ),
    "weight beside qweight": (add(f"{UP}.weight", torch.zeros(2)), r"0\.up: weight beside"),
    "no module name": (add("qweight", torch.zeros(2)), "belong to no named module"),
    "qweight int64": (put(f"{UP}.qweight", Tensor.long), r"0\.up: qweight: got int64"),
    "qweight flat": (put(f"{UP}.qweight", Tensor.flatten), r"qweight: got int32 \[768\]"),
    "qweight empty": (put(f"{UP}.qweight", lambda t: t[:0]), r"qweight: got int32 \[0, 12\]"),
    "rows lost": (put(f"{UP}.qweight", lambda t: t[:-32]), r"scales: got 2 groups for in_feat"),
    "columns lost": (put(f"{UP}.qweight", lambda t: t[:, :-1]), r"has 88 output features"),
    "packed along K": (put(f"{UP}.qweight", lambda t: t.reshape(8, 96)), "768 output features"),
    "qzeros float": (put(f"{UP}.qzeros", Tensor.float), r"qzeros: got float32 \[2, 12\]"),
    "qzeros row lost": (put(f"{UP}.qzeros", lambda t: t[:1]), r"qzeros: got int32 \[1, 12\]"),
    "scales int": (put(f"{UP}.scales", Tensor.int), r"scales: got int32"),
    "scales row lost": (
        several(put(f"{UP}.scales", lambda t: t[:1]), put(f"{UP}.qzeros", lambda t: t[:1])),
        r"0\.up: scales: got 1 groups .*must be 2",
    ),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"0\.down: bias: got float16 \[63\]"),
    "bias int": (put(f"{DOWN}.bias", Tensor.int), r"0\.down: bias: got int32"),
    "scale NaN": (poke(f"{UP}.scales", (1, 3), float("nan")), r"up: scales: got nan at \[1, 3\]"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
    "scales float32": (put(f"{UP}.scales", Tensor.float), "dtype=torch.float16"),
}  # fmt: skip

ct = configured(ct_config)
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
PACK_QUANTIZED: Cases = {
    "truncated": (truncate(-3000), "is truncated: its header needs"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    "no config": (remove("config.json"), "config.json cannot be read"),
    # the configuration
    "8 bits": (ct(num_bits=8), r"config_groups\.group_0\.weights\.num_bits: got 8"),
    "floats": (ct(type="float"), "weights.type: got 'float'"),
    "int-quantized": (ct(format="int-quantized"), "format: got 'int-quantized' .8-bit"),
    "float-quantized": (ct(format="float-quantized"), "format: got 'float-quantized'"),
    "nvfp4": (ct(format="nvfp4-pack-quantized"), "4-bit floats, not integers"),
    "no format": (ct(format=None), "format: got None"),
    "activations": (ct(input_activations={"num_bits": 8}), "input_activations: got quantised"),
    "cache": (ct(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: got a quantised cache"),
    "no groups": (ct(config_groups={}), "config_groups: got {}"),
    "tensor strategy": (ct(strategy="tensor"), "strategy: got 'tensor'"),
    "group size 16": (ct(group_size=16), "group_size: got 16; it must be 32, 64 or 128"),
    "broken target": (ct(targets=["re:("]), "targets: got 're:.'; not a regular expression"),
    "ignored but quantized": (
        ct(ignore=["re:.*up"]),
        r"0\.up: the config's ignore names it, but it has weight_",
    ),
    "no target": (
        ct(targets=["re:.*down"]),
        r"0\.up: no target of the config's config_groups matches it, but it has",
    ),
    "another group size": (
        ct(group_size=64),
        r"0\.up: weight_scale: got 2 groups for in_features=64; with group_size 64 of "
        r"config_groups\.group_0 there must be 1",
    ),
    "channel": (ct(strategy="channel"), r"with strategy channel of .* there must be 1"),
    "said to be asymmetric": (
        ct(symmetric=False),
        r"0\.up: weight_zero_point is missing \(format pack-quantized of config_groups\.group_0",
    ),
    "said to be symmetric": (
        add(f"{UP}.weight_zero_point", torch.full((12, 2), 0x77777777, dtype=torch.int32)),
        r"0\.up: zero points: got 7 in group 0, column 0; with symmetric: true in the config",
    ),
    "order missing": (ct(actorder="group"), r"0\.up: weight_g_idx is missing"),
    "order missing, by its alias": (ct(actorder="dynamic"), r"weight_g_idx is missing"),
    "order not in the config": (
        add(f"{UP}.weight_g_idx", SHUFFLED),
        r"0\.up: weight_g_idx: got features out of the order .* actorder 'group'",
    ),
    "said to be marlin-24": (
        ct(format="marlin-24", group_size=128),
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
        several(ALL_G_IDX, ct(actorder="group"), poke(f"{UP}.weight_g_idx", (0,), 1)),
        "0.up: g_idx puts 31 features into group 0",
    ),
    "order out of range": (
        several(ALL_G_IDX, ct(actorder="group"), poke(f"{UP}.weight_g_idx", (7,), 2)),
        r"0.up: g_idx\[7\] is 2, want a group in 0\.\.1",
    ),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"0\.down: bias: got float16 \[63\]"),
    "scale NaN": (poke(f"{UP}.weight_scale", (3, 1), float("nan")), "weight_scale: got nan at"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
}  # fmt: skip

dense = configured(marlin_config)
ORIGINAL_MARLIN: Cases = {
    "truncated": (truncate(-300), "is truncated: its header needs"),
    "half a header": (truncate(100), "is truncated"),
    "no config": (remove("config.json"), "config.json cannot be read"),
    "shard missing": (
        sharded(lambda r, m: (r / "model-00002-of-00003.safetensors").unlink()),
        "named by the index but missing",
    ),
    # the configuration
    "8 bits": (dense(bits=8), "bits: got 8 with the packing of the original Marlin kernel"),
    "bits as text": (dense(bits="4"), "bits: got '4'"),
    "bits true": (dense(bits=True), "bits: got True"),
    "no group size": (dense(group_size=None), "group_size: got None .* groups of 128, or one"),
    "group size 64": (dense(group_size=64), "group_size: got 64 with"),
    "group size 128.0": (dense(group_size=128.0), r"group_size: got 128\.0 with"),
    "asymmetric": (dense(sym=False), "sym: got False .* stores no zero points"),
    "order": (dense(desc_act=True), "desc_act: got True .* stores no order of the features"),
    "pack dtype": (dense(pack_dtype="int16"), "pack_dtype: got 'int16'"),
    "alias disagrees": (dense(w_bit=8), "bits is 4 but its alias w_bit is 8"),
    "overrides": (dense(dynamic={".*up": {"bits": 8}}), "dynamic: got .*only exclusions"),
    "dynamic is a list": (dense(dynamic=[1]), r"dynamic: got \[1\]"),
    "formats disagree": (
        dense(style="autogptq 0.7", checkpoint_format="gptq"),
        "checkpoint_format: got 'gptq' with the packing",
    ),
    "two configs disagree": (
        text("quantize_config.json", json.dumps({"bits": 4, "group_size": -1})),
        "disagree on group_size: 128 and -1",
    ),
    "second config of another tool": (
        several(
            text("config.json", "{}"),
            text("quantize_config.json", '{"quant_method": "awq", "format": "marlin"}'),
        ),
        "quant_method: got 'awq' with the packing .*group_size: got None",
    ),
    "said to be gptq": (
        dense(style="autogptq 0.7", is_marlin_format=None),
        r"no quantized layer: no tensor is called <module>\.qweight, as the format gptq",
    ),
    "said to be awq": (dense(quant_method="awq"), "checkpoint_format: got 'marlin'"),
    "said to be ours": (dense(style="own", format_version=1), "own format already"),
    "said to be 2:4": (
        dense(checkpoint_format="marlin_24"),
        "up: B beside s: a quantized linear layer has only B_24, s, B_meta, bias",
    ),
    # the layers
    "B missing": (tensors(lambda t: t.pop(f"{UP}.B")), "up: B is missing"),
    "s missing": (tensors(lambda t: t.pop(f"{UP}.s")), "up: s is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith((UP, DOWN))]),
        "no quantized layer.*<module>.B, as the format original-marlin",
    ),
    "weight beside B": (add(f"{UP}.weight", torch.zeros(2)), "up: weight beside B, s: a quantized"),
    "g_idx beside B": (add(f"{UP}.g_idx", torch.zeros(384).int()), "up: g_idx beside B, s"),
    "no module name": (add("B", torch.zeros(2)), "belong to no named module"),
    "B int64": (put(f"{UP}.B", Tensor.long), r"up: B: got int64 \[24, 128\]; it must be int32"),
    "B flat": (put(f"{UP}.B", Tensor.flatten), r"up: B: got int32 \[3072\]"),
    "B empty": (put(f"{UP}.B", lambda t: t[:0]), r"up: B: got int32 \[0, 128\]"),
    "B rows lost": (put(f"{UP}.B", lambda t: t[:-8]), r"up: s: got float16 \[3, 64\].*\[2, 64\]"),
    "B columns lost": (put(f"{UP}.B", lambda t: t[:, :-64]), "up: B: .* multiple of 64"),
    "8-bit words": (put(f"{UP}.B", lambda t: t.repeat(1, 2)), "up: s: got .*out_features=128"),
    "s int": (put(f"{UP}.s", Tensor.int), r"up: s: got int32"),
    "s float32": (put(f"{UP}.s", Tensor.float), r"up: s: got float32.*dtype=torch.float16"),
    "s group lost": (put(f"{UP}.s", lambda t: t[:2]), r"up: s: got float16 \[2, 64\]"),
    "s of one group": (
        put(f"{UP}.s", lambda t: t[:1]),
        "up: s: got 1 groups for in_features=384; with group_size 128 .*must be 3",
    ),
    "another group size": (dense(group_size=-1), "up: s: got 3 groups .*must be 1"),
    "s NaN": (poke(f"{UP}.s", (1, 3), float("nan")), "up: s: got nan at"),
    "bias inf": (poke(f"{DOWN}.bias", (4,), float("inf")), r"down: bias: got inf at \[4\]"),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias: got float16 \[127\]"),
    "bias int": (put(f"{DOWN}.bias", Tensor.int), "down: bias: got int32"),
}  # fmt: skip

ct_24 = configured(config_24)
MARLIN_24: Cases = {
    "truncated": (truncate(-300), "is truncated: its header needs"),
    "8 bits": (ct_24(num_bits=8), "num_bits: got 8"),
    "group size 64": (ct_24(group_size=64), "group_size: got 64; 'marlin-24' has groups of 128"),
    "asymmetric": (ct_24(symmetric=False), "symmetric: got false; 'marlin-24' stores no zero"),
    "order": (ct_24(actorder="group"), "actorder: got 'group'; 'marlin-24' stores no order"),
    "channel": (
        ct_24(strategy="channel", group_size=None),
        r"up: scale_packed: got 3 groups for in_features=384; with strategy channel",
    ),
    "said to be pack-quantized": (
        ct_24(format="pack-quantized"),
        r"up: scale_packed beside weight_packed.*up: weight_scale is missing \(format pack-quant",
    ),
    "ignored": (ct_24(ignore=["re:.*up"]), "up: the config's ignore names it"),
    "weight missing": (tensors(lambda t: t.pop(f"{UP}.weight_packed")), "weight_packed is missing"),
    "scale missing": (tensors(lambda t: t.pop(f"{UP}.scale_packed")), "scale_packed is missing"),
    "meta missing": (tensors(lambda t: t.pop(f"{UP}.meta")), "up: meta is missing"),
    "scales twice": (add(f"{UP}.weight_scale", torch.ones(64, 3)), "weight_scale beside"),
    "meta of 32 bits": (put(f"{UP}.meta", Tensor.int), r"up: meta: got int32 \[12, 128\]"),
    "meta row lost": (put(f"{UP}.meta", lambda t: t[:-1]), r"up: meta: got int16 \[11, 128\]"),
    "weight int64": (put(f"{UP}.weight_packed", Tensor.long), "weight_packed: got int64"),
    "odd columns": (
        several(*(put(f"{UP}.{leaf}", lambda t: t[:, :-4]) for leaf in ("weight_packed", "meta"))),
        "out_features is a multiple of 64",
    ),
    "8-bit words": (put(f"{UP}.weight_packed", lambda t: t.repeat(1, 2)), "up: meta: got int16"),
    "group lost": (put(f"{UP}.scale_packed", lambda t: t[:2]), r"scale_packed: got float16 \[2, "),
    "only one group": (
        put(f"{UP}.scale_packed", lambda t: t[:1]),
        r"scale_packed: got 1 groups for in_features=384; with group_size 128 .* must be 3",
    ),
    "places that fall": (
        poke(f"{UP}.meta", (3, 5), 0),
        r"up: meta: got the places 0, 0 for row \d+, columns \d+\.\.\d+; the first must be",
    ),
    "scale NaN": (poke(f"{UP}.scale_packed", (1, 3), float("nan")), "scale_packed: got nan at"),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias: got float16 \[127\]"),
}  # fmt: skip

sparse = configured(sparse_marlin_config)
SPARSE_MARLIN: Cases = {
    # the configuration
    "8 bits": (sparse(bits=8), "bits: got 8 with the packing of Sparse-Marlin"),
    "no group size": (sparse(group_size=None), "group_size: got None .* groups of 128, or one"),
    "group size 64": (sparse(group_size=64), "group_size: got 64 with"),
    "asymmetric": (sparse(sym=False), "sym: got False .* stores no zero points"),
    "order": (sparse(desc_act=True), "desc_act: got True .* stores no order of the features"),
    "formats disagree": (
        sparse(quant_method="gptq_marlin_24", checkpoint_format="gptq"),
        "checkpoint_format: got 'gptq' with the packing of Sparse-Marlin",
    ),
    "overrides": (sparse(dynamic={".*up": {"bits": 8}}), "dynamic: got .*only exclusions"),
    "said to be dense": (
        sparse(checkpoint_format="marlin"),
        "up: B_24 beside s: a quantized linear layer has only B, s, bias.*up: B is missing",
    ),
    "said to be gptq": (
        sparse(checkpoint_format=None),
        r"no quantized layer: no tensor is called <module>\.qweight, as the format gptq",
    ),
    "said to be awq": (sparse(quant_method="awq"), "checkpoint_format: got 'marlin_24'"),
    "said to be ours": (sparse(quant_method="marlin", format_version=1), "own format already"),
    "overridden": (
        sparse(checkpoint_format="gptq", dynamic={".*up": {"checkpoint_format": "marlin_24"}}),
        "no quantized layer",
    ),
    "another group size": (sparse(group_size=-1), "up: s: got 3 groups .*must be 1"),
    # the layers
    "B_24 missing": (tensors(lambda t: t.pop(f"{UP}.B_24")), "up: B_24 is missing"),
    "B_meta missing": (tensors(lambda t: t.pop(f"{UP}.B_meta")), "up: B_meta is missing"),
    "s missing": (tensors(lambda t: t.pop(f"{UP}.s")), "up: s is missing"),
    "weight beside": (add(f"{UP}.weight", torch.zeros(2)), "up: weight beside B_24, s, B_meta"),
    "no module name": (add("B_24", torch.zeros(2)), "belong to no named module"),
    "B_24 int64": (put(f"{UP}.B_24", Tensor.long), r"up: B_24: got int64 \[12, 128\]; it must be"),
    "B_24 empty": (put(f"{UP}.B_24", lambda t: t[:0]), r"up: B_24: got int32 \[0, 128\]"),
    "odd columns": (put(f"{UP}.B_24", lambda t: t[:, :-4]), "up: B_24: .* multiple of 64"),
    "8-bit words": (put(f"{UP}.B_24", lambda t: t.repeat(1, 2)), "up: B_meta: got int16"),
    "B_meta int32": (put(f"{UP}.B_meta", Tensor.int), r"B_meta: got int32 \[12, 128\]; .* as B_24"),
    "B_meta by rows": (put(f"{UP}.B_meta", lambda t: t.view(64, 24)), r"B_meta: .* \[64, 24\]"),
    "places that fall": (poke(f"{UP}.B_meta", (3, 5), 0), "up: B_meta: got the places 0, 0 for"),
    "group lost": (put(f"{UP}.s", lambda t: t[:2]), r"up: s: got float16 \[2, 64\]; B_24 int32"),
    "s float32": (put(f"{UP}.s", Tensor.float), r"up: s: got float32.*dtype=torch.float16"),
    "s NaN": (poke(f"{UP}.s", (1, 3), float("nan")), "up: s: got nan at"),
    "bias length": (put(f"{DOWN}.bias", lambda t: t[:-1]), r"down: bias: got float16 \[127\]"),
}  # fmt: skip


@dataclass(frozen=True)
class Refusals:
    """``write`` makes a valid checkpoint, which each of the ``cases`` damages; of those that are
    done ``together`` every reason must be given.
    """

    write: Callable[[Path], Source]
    cases: Cases
    together: tuple[str, ...]


FORMATS = {
    "awq": Refusals(
        partial(write_checkpoint, config=awq_config(), tensors_of=awq_tensors),
        AWQ,
        ("scale NaN", "bias inf"),
    ),
    "pack-quantized": Refusals(
        partial(write_checkpoint, config=ct_config(), tensors_of=partial(ct_tensors, zeros="none")),
        PACK_QUANTIZED,
        ("scale NaN", "bias inf"),
    ),
    "original-marlin": Refusals(write_marlin, ORIGINAL_MARLIN, ("s NaN", "bias inf")),
    "marlin-24": Refusals(
        write_sparse, MARLIN_24, ("places that fall", "scale NaN", "bias length")
    ),
    "sparse-marlin": Refusals(
        write_sparse_marlin, SPARSE_MARLIN, ("places that fall", "s NaN", "bias length")
    ),
}
