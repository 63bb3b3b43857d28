"""Small synthetic checkpoints for the tests, and what they hold, written by the safetensors library
itself: GPTQ, AWQ, compressed-tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch
from operands import random_24
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass
class GptqLayer:
    """The true content of one quantized layer: q uint8 [N, K], zeros uint8 [G, N], scales [G, N],
    g_idx int32 [K].
    """

    q: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    group_size: int
    bias: Tensor | None = None

    def weight(self) -> Tensor:
        """The dequantized weight, fp64 [N, K]."""
        index = self.g_idx.long()
        return (self.q.double() - self.zeros[index].T.double()) * self.scales[index].T.double()


@dataclass
class Source:
    """A checkpoint on disk and what it holds."""

    directory: Path
    layers: dict[str, GptqLayer]
    others: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def make_layer(
    k: int,
    n: int,
    group_size: int = 32,
    *,
    sym: bool = True,
    act_order: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> GptqLayer:
    """A layer of random integers; ``act_order`` shuffles the features among the groups."""
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    g_idx = torch.arange(k) // group_size if group_size != -1 else torch.zeros(k, dtype=torch.int64)
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=random)]
    zeros = torch.full((groups, n), 8, dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(1, 16, (groups, n), generator=random).to(torch.uint8)
    return GptqLayer(
        q=torch.randint(0, 16, (n, k), generator=random).to(torch.uint8),
        zeros=zeros,
        scales=(torch.rand(groups, n, generator=random) * 0.02 + 0.001).to(dtype),
        g_idx=g_idx.to(torch.int32),
        group_size=group_size,
        bias=torch.randn(n, generator=random).to(dtype) if bias else None,
    )


def make_sparse(k: int, n: int, group_size: int = 32, **options: Any) -> GptqLayer:
    """A random layer with its zero point at all but none, one or two of every four places."""
    layer = make_layer(k, n, group_size, **options)
    _, mask = random_24(n, k)
    zero = layer.zeros[layer.g_idx.long()].T
    layer.q = torch.where(mask, layer.q, zero)
    return layer


def pack_zeros(zeros: Tensor, version: int = 1) -> Tensor:
    """uint8 [G, N] -> a GPTQ ``qzeros``, int32 [G, N/8]; version 1 stores each zero point minus
    one, modulo 16.
    """
    stored = (zeros.long() - (1 if version == 1 else 0)) & 15
    words = (stored.view(zeros.size(0), -1, 8) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_tensors(layer: GptqLayer, version: int = 1) -> dict[str, Tensor]:
    """The tensors that a GPTQ checkpoint stores for a layer."""
    tensors = {
        "qweight": reference.gptq_pack(layer.q).contiguous(),
        "qzeros": pack_zeros(layer.zeros, version),
        "scales": layer.scales,
        "g_idx": layer.g_idx,
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def gptq_config(group_size: int = 32, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` of a GPTQ model; ``changes`` go to its quantization_config, None removes a
    key.
    """
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        **changes,
    }
    quantization = {key: value for key, value in quantization.items() if value is not None}
    return {"model_type": "tiny", "hidden_size": 64, "quantization_config": quantization}


def awq_tensors(layer: GptqLayer) -> dict[str, Tensor]:
    """The tensors that an AWQ checkpoint stores for a layer."""
    tensors = {
        "qweight": reference.awq_pack(layer.q),
        "qzeros": reference.awq_pack(layer.zeros.T),  # outputs are packed as in a weight
        "scales": layer.scales,
    }
    return tensors if layer.bias is None else {**tensors, "bias": layer.bias}


def awq_config(group_size: int = 32, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` of an AWQ model, changed as by :func:`gptq_config`."""
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        **changes,
    }
    quantization = {key: value for key, value in quantization.items() if value is not None}
    return {"model_type": "tiny", "hidden_size": 64, "quantization_config": quantization}


def pack_rows(q: Tensor) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, ceil(columns/8)], nibble i of a word at bit 4i."""
    padded = torch.nn.functional.pad(q.long(), (0, -q.size(1) % 8)).view(q.size(0), -1, 8)
    words = (padded << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def ct_tensors(
    layer: GptqLayer, *, zeros: str = "packed", order: str = "if needed"
) -> dict[str, Tensor]:
    """The tensors that a ``pack-quantized`` checkpoint of compressed-tensors stores for a layer.

    ``zeros``: packed, int8 (as older versions stored them), or none, for a symmetric layer.
    ``order``: weight_g_idx if the layer has an order, always, never, or one that is not set (-1).
    """
    n, k = layer.q.shape
    in_order = torch.equal(layer.g_idx.sort().values, layer.g_idx)
    tensors = {
        "weight_packed": pack_rows(layer.q),
        "weight_scale": layer.scales.T.contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }
    if zeros == "packed":
        tensors["weight_zero_point"] = pack_rows(layer.zeros).T.contiguous()
    elif zeros == "int8":
        tensors["weight_zero_point"] = (layer.zeros.T.int() - 8).to(torch.int8).contiguous()
    if order == "unset":
        tensors["weight_g_idx"] = torch.full_like(layer.g_idx, -1)
    elif order == "always" or (order == "if needed" and not in_order):
        tensors["weight_g_idx"] = layer.g_idx
    return tensors if layer.bias is None else {**tensors, "bias": layer.bias}


def ct_config(group_size: int = 32, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` of compressed-tensors; ``changes`` go to the settings of its one group's
    weights or, where they are called so, to the group or to the whole.
    """
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
    }
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.9,
        "version": "0.9.4",
    }
    for key, value in changes.items():
        place = next((p for p in (quantization, group) if key in p), weights)
        place[key] = value
    return {"model_type": "tiny", "hidden_size": 64, "quantization_config": quantization}


def default_layers() -> dict[str, GptqLayer]:
    """Three layers: plain, with bias, and with sizes that are not multiples of 64."""
    return {
        "model.layers.0.up": make_layer(64, 96, seed=1),
        "model.layers.0.down": make_layer(96, 64, bias=True, seed=2),
        "model.layers.1.up": make_layer(72, 40, seed=3),
    }


class Tiny(nn.Module):
    """A model with a tied head, a buffer, and the layers of ``default_layers``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(50, 64)
        self.model.norm = nn.LayerNorm(64, bias=False)
        self.model.register_buffer("step", torch.tensor(0))
        self.model.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        first, second = nn.Module(), nn.Module()
        first.up, first.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)
        second.up = nn.Linear(72, 40, bias=False)
        self.model.layers = nn.ModuleList([first, second])
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.model.embed.weight

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        first, second = self.model.layers
        x = self.model.norm(self.model.embed(tokens).to(self.model.norm.weight.dtype)).to(dtype)
        x = first.down(torch.relu(first.up(x)))
        x = second.up(torch.cat([x, x[..., :8]], -1)).float()
        return x @ self.head.weight[:, :40].float().T


def dequantized(source: Source) -> Tiny:
    """The model with the checkpoint's weights in fp32, integers times scales, never packed."""
    model = Tiny()
    state = {name: tensor.clone() for name, tensor in source.others.items()}
    state["head.weight"] = state["model.embed.weight"]
    for name, layer in source.layers.items():
        state[f"{name}.weight"] = layer.weight().float()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    model.load_state_dict(state)
    return model


def write_checkpoint(
    directory: Path,
    layers: dict[str, GptqLayer] | None = None,
    *,
    config: dict[str, Any] | None = None,
    version: int = 1,
    shards: int = 1,
    others: dict[str, Tensor] | None = None,
    tensors_of: Callable[[GptqLayer], dict[str, Tensor]] | None = None,
) -> Source:
    """Write a checkpoint; with several shards a layer's tensors are spread over them on purpose.

    ``tensors_of`` a layer are the tensors by leaf name; None: those of GPTQ.
    """
    layers = default_layers() if layers is None else layers
    if others is None:
        random = torch.Generator().manual_seed(7)
        others = {
            "model.embed.weight": torch.randn(50, 64, generator=random).half(),
            "model.norm.weight": torch.randn(64, generator=random).bfloat16(),
            "model.step": torch.tensor(3),
            "model.mask": torch.tensor([True, False, True]),
        }
    tensors = {name: tensor.clone() for name, tensor in others.items()}
    for name, layer in layers.items():
        stored = gptq_tensors(layer, version) if tensors_of is None else tensors_of(layer)
        tensors |= {f"{name}.{leaf}": t.clone() for leaf, t in stored.items()}
    if config is None:
        sizes = {layer.group_size for layer in layers.values()}
        config = gptq_config(sizes.pop(), checkpoint_format="gptq" if version == 1 else "gptq_v2")
    directory.mkdir(parents=True)
    write_tensors(directory, tensors, shards)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text("{}")
    return Source(directory, layers, others, tensors, config)


def write_tensors(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write tensors as one file, or round robin over ``shards`` files and an index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file under a folder and its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the safetensors library."""
    return {
        name: t
        for file in sorted(directory.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def assert_holds(directory: Path, source: Source) -> None:
    """The converted checkpoint has the source's weights, by the tests' own arithmetic, and its
    other tensors.
    """
    tensors = read_all(directory)
    modules = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"]
    assert set(modules) == set(source.layers)
    for name, layer in source.layers.items():
        n, k = layer.q.shape
        assert modules[name] == {
            "in_features": k,
            "out_features": n,
            "group_size": layer.group_size,
        }
        got = reference.dequantize64(
            tensors.pop(f"{name}.qweight"),
            tensors.pop(f"{name}.scales"),
            tensors.pop(f"{name}.zeros", None),
            tensors.pop(f"{name}.perm", None),
            k,
        )
        assert torch.equal(got, layer.weight()), name
        if layer.bias is not None:
            assert torch.equal(tensors.pop(f"{name}.bias"), layer.bias)
    assert set(tensors) == set(source.others)
    assert all(torch.equal(tensors[name], want) for name, want in source.others.items())
