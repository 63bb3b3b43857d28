"""LoRA on packed layers by peft: trained, saved and loaded; and what it cannot do is refused."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import marlin

peft = pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5.0")
import_module("marlin.integrations.peft")
import_module("marlin.integrations.transformers")

from tiny_llama import TOKENS, add_adapter, assert_equal_states, write_llama  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

TARGETS = ["q_proj", "o_proj", "down_proj"]  # dense, dense with act-order, 2:4


def load(directory: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).to(device)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def test_trained_saved_and_loaded(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    folder = write_llama(tmp_path / "dst", dtype=torch.bfloat16).directory
    model = peft.get_peft_model(load(folder, device), lora(lora_dropout=0.05))
    bases = {
        name: type(module.get_base_layer())
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(bases) == 2 * len(TARGETS)
    assert set(bases.values()) == {marlin.MarlinLinear, marlin.MarlinLinear24}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(bases)
    assert {p.device.type for p in trained.values()} == {device}

    tokens = TOKENS.to(device)
    optimizer = torch.optim.Adam(trained.values(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses

    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder, device), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, load(folder, device)(tokens).logits)
    assert_equal_states(model.unload(), load(folder, device))


def test_adapters_of_transformers(tmp_path: Path, device: str) -> None:
    model = load(write_llama(tmp_path / "dst").directory, device)
    before = model(TOKENS.to(device)).logits
    add_adapter(model, lora())
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(model(TOKENS.to(device)).logits, before, rtol=0, atol=0)


def test_merging_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(load(write_llama(tmp_path / "dst").directory, "cpu"), lora())
    with pytest.raises(ValueError, match=r"merge: got an adapter of a Marlin.*merge it into the"):
        model.merge_and_unload()


def test_fused_layers(tmp_path: Path) -> None:
    """Adapters come before fusing, which leaves their layers out."""
    folder = write_llama(tmp_path / "dst").directory
    model = load(folder, "cpu")
    marlin.fuse(model)
    with pytest.raises(ValueError, match=r"got a layer that marlin.fuse.*call marlin.unfuse"):
        peft.get_peft_model(model, lora())
    options = lora(init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder, "cpu"), options).eval()
    with torch.no_grad():
        before = model(TOKENS).logits
        fused = {name for group in marlin.fuse(model).fused for name in group.names}
        assert {name.rpartition(".")[2] for name in fused} == {"gate_proj", "up_proj"}
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_variants_that_need_the_weight_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(write_llama(tmp_path / "dst").directory, "cpu")
    with pytest.raises(AttributeError, match=r"Linear\w* has no 'weight': it holds 4-bit codes"):
        peft.get_peft_model(model, lora(**options))


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "marlin.integrations.peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft.*marlin\[peft\]"):
        import_module("marlin.integrations.peft")
