"""Models of transformers, and converted checkpoints, fused."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from fusable import (
    CountGemms,
    assert_equal_states,
    assert_slots_are_empty,
    compiled_with_count,
    fused_and_plain,
)
from torch import nn

import marlin
from marlin import FusedLinear, fuse, replace_linear

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = torch.arange(7, 39).view(2, 16)


def tiny(architecture: str, **replace: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SIZES)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).half().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    replace_linear(model, group_size=64, **replace)
    return model


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2"])
def test_transformers(architecture: str, device: str) -> None:
    model, plain = fused_and_plain(tiny(architecture).to(device))
    tokens = TOKENS.to(device)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            q, k, v = module.fused_q_proj_k_proj_v_proj.sizes
            assert q == 2 * k == 2 * v
            assert (module.q_proj.bias is not None) == (architecture == "Qwen2")
    assert_equal_states(model, plain)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            with CountGemms() as gemms:
                got = model(tokens).logits
            want = plain(tokens).logits
        assert gemms.count == 8  # qkv, o, gate and up, down: of two layers
        tolerance = 0 if device == "cpu" else 4e-3 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    assert_slots_are_empty(model)


def test_transformers_generate() -> None:
    model, plain = fused_and_plain(tiny("Llama"))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transformers_compile(architecture: str, mode: Any) -> None:
    torch._dynamo.reset()
    model, _ = fused_and_plain(tiny(architecture))
    compiled, counts = compiled_with_count(model, "aot_eager")
    with mode():
        for _ in range(2):
            got = compiled(TOKENS, use_cache=False).logits
            assert torch.equal(got, model(TOKENS, use_cache=False).logits)
    assert counts == [8]


def test_transformers_sparse_and_asymmetric() -> None:
    for options in ({"symmetric": False}, {"sparse": True, "prune": "magnitude"}):
        model, plain = fused_and_plain(tiny("Llama", **options))
        with torch.no_grad(), CountGemms() as gemms:
            got = model(TOKENS).logits
        assert gemms.count == 8
        assert torch.equal(got, plain(TOKENS).logits)


def test_save_pretrained(tmp_path: Any) -> None:
    """A fused model is written as the checkpoint that it was read from."""
    converted = pytest.importorskip("test_transformers")
    source = converted.write_llama(tmp_path / "dst")
    model = converted.load(source.directory)
    report = fuse(model)
    assert [len(layers.names) for layers in report.fused] == [2, 2, 2, 2]
    model.save_pretrained(tmp_path / "again")
    plain = converted.load(source.directory)
    assert_equal_states(converted.load(tmp_path / "again"), plain)
    one, other = (
        safetensors.torch.load_file(directory / "model.safetensors")
        for directory in (source.directory, tmp_path / "again")
    )
    assert one.keys() == other.keys()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_load_with_fuse(tmp_path: Any) -> None:
    converted = pytest.importorskip("test_transformers")
    source = converted.write_llama(tmp_path / "dst")
    settings = {k: v for k, v in source.config.items() if k != "quantization_config"}

    def empty() -> Any:
        return converted.LlamaForCausalLM(converted.LlamaConfig(**settings)).eval()

    plain = marlin.load(empty(), source.directory)
    model = marlin.load(empty(), source.directory, fuse=True)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 4
    assert_equal_states(model, plain)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    with pytest.raises(marlin.CheckpointError, match=r"q_proj.*fused with others.*marlin\.unfuse"):
        marlin.load(model, source.directory)
