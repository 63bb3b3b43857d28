"""Checkpoints of a tiny Llama in every format that is read, and the model that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    Source,
    awq_config,
    awq_tensors,
    ct_config,
    ct_tensors,
    gptq_config,
    gptq_tensors,
    make_layer,
    make_sparse,
    write_checkpoint,
)
from test_convert_marlin_24 import config_24, make_sparse_layer, sparse_tensors
from test_convert_original_marlin import marlin_config, marlin_tensors
from test_convert_sparse_marlin import sparse_marlin_config, sparse_marlin_tensors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import marlin

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "initializer_range": 0.2,
}
TOKENS = torch.arange(7, 39).view(2, 16)


@dataclass(frozen=True)
class Format:
    """How a checkpoint is written: its config, a layer's tensors, and what layers may be."""

    config: dict[str, Any]
    tensors_of: Callable[[GptqLayer], dict[str, Tensor]]
    order: bool = False
    sparse: bool = False
    groups: bool = True  # False: one group and no zero points, and output features in blocks of 64


FORMATS = {
    "gptq": Format(gptq_config(sym=None), gptq_tensors, order=True),
    "awq": Format(awq_config(), awq_tensors),
    "compressed-tensors": Format(
        ct_config(symmetric=False, actorder="group"),
        partial(ct_tensors, order="always"),
        order=True,
    ),
    "marlin-24": Format(
        config_24(ignore=["lm_head", "re:.*[kv]_proj"]),  # of 32 output features: not of 64
        sparse_tensors,
        sparse=True,
    ),
    "sparse-marlin": Format(
        sparse_marlin_config(style="vllm, its own name", dynamic={r"-:.*[kv]_proj": {}}),
        sparse_marlin_tensors,
        sparse=True,
    ),
    "original-marlin": Format(
        marlin_config(-1, "own", dynamic={r"-:.*[kv]_proj": {}}), marlin_tensors, groups=False
    ),
}


def quantized_layers(
    model: nn.Module, form: Format, dtype: torch.dtype, head: bool
) -> dict[str, GptqLayer]:
    """Random integers for every linear layer: 2:4 in the MLPs, zero points and orders beside."""
    layers: dict[str, GptqLayer] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear) or (name == "lm_head" and not head):
            continue
        k, n = module.in_features, module.out_features
        if (form.sparse or not form.groups) and n % 64:
            continue
        options: dict[str, Any] = {"seed": seed, "bias": module.bias is not None}
        if form.sparse:
            layers[name] = make_sparse_layer(n, k, 128, **options)
        elif not form.groups:
            layers[name] = make_layer(k, n, -1, dtype=dtype, **options)
        elif ".mlp." in name:
            layers[name] = make_sparse(k, n, sym="down" not in name, dtype=dtype, **options)
        else:
            order = form.order and name.endswith("o_proj")
            layers[name] = make_layer(k, n, act_order=order, dtype=dtype, **options)
        layers[name].scales.mul_(0.5)
    return layers


def write_original(
    directory: Path,
    form: str = "gptq",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float16,
    head: bool = False,
    shards: int = 1,
    **sizes: int,
) -> Source:
    """A checkpoint of a tiny Llama in one of ``FORMATS``; ``sizes`` are changes of ``SIZES``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES | sizes, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"]
    )
    model = LlamaForCausalLM(config).to(dtype)
    layers = quantized_layers(model, FORMATS[form], dtype, head)
    start = tuple(f"{name}." for name in layers)
    others = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(start) and (name != "lm_head.weight" or not tied)
    }
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["quantization_config"] = FORMATS[form].config["quantization_config"]
    source = write_checkpoint(
        directory,
        layers,
        config=settings,
        others=others,
        shards=shards,
        tensors_of=FORMATS[form].tensors_of,
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).unlink()
    return source


def write_llama(directory: Path, *, sparse: bool = True, shards: int = 1, **options: Any) -> Source:
    """A converted checkpoint of a tiny Llama in ``directory``, and what it was made from."""
    original = directory.with_name(directory.name + "-gptq")
    source = write_original(original, shards=shards, **options)
    limit = 20_000 if shards > 1 else 10**9
    marlin.convert(original, directory, progress=False, sparse=sparse, shard_bytes=limit)
    return Source(directory, source.layers, source.others, source.tensors, source.config)


def exact_model(source: Source) -> Any:
    """The model in fp32, of the very numbers that the checkpoint stands for."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    state = {name: tensor.float() for name, tensor in source.others.items()}
    for name, layer in source.layers.items():
        state[f"{name}.weight"] = layer.weight().float()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing in ([], ["lm_head.weight"])
    return model.eval()


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def add_adapter(model: Any, config: Any) -> None:
    """As transformers does it, which may want a newer peft than there is."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"this transformers wants another peft: {error}")
