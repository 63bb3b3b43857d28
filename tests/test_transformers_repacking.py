"""Checkpoints of other formats through transformers: packed while they are loaded."""

from __future__ import annotations

import json
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_all, write_tensors
from damage import Damage, poke, put, tensors, text
from safetensors.torch import save_file

import marlin
from marlin import CheckpointError, MarlinLinear, MarlinLinear24

pytest.importorskip("transformers", minversion="5.0")
integration = import_module("marlin.integrations.transformers")
open_source = import_module("marlin.integrations._repacking").open_source

from tiny_llama import (  # noqa: E402
    FORMATS,
    TOKENS,
    assert_equal_states,
    exact_model,
    write_original,
)
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.0.mlp.up_proj"
every_format = pytest.mark.parametrize("form", FORMATS)


def load(directory: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The checkpoint as it is, packed while it is loaded."""
    with integration.repacking():
        return kind.from_pretrained(directory, **options)


def load_converted(directory: Path, target: Path, **options: Any) -> Any:
    """The same by way of a conversion."""
    marlin.convert(directory, target, progress=False)
    return AutoModelForCausalLM.from_pretrained(target, **options)


@every_format
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_those_of_the_converter(
    tmp_path: Path, form: str, shards: int, tied: bool
) -> None:
    source = write_original(tmp_path / "src", form, shards=shards, tied=tied)
    model, info = load(source.directory, output_loading_info=True)
    assert not any(info.values()), info
    assert not model.training
    kind = MarlinLinear24 if FORMATS[form].sparse else MarlinLinear
    assert type(model.get_submodule(LAYER)) is kind
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(t.data_ptr() % 16 == 0 for t in model.buffers())
    assert_equal_states(model, load_converted(source.directory, tmp_path / "dst"))
    with torch.no_grad():
        want = exact_model(source)(TOKENS).logits
        got = model(TOKENS).logits.float()
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))


@every_format
def test_saved_it_is_a_converted_checkpoint(tmp_path: Path, form: str) -> None:
    source = write_original(tmp_path / "src", form)
    model = load(source.directory)
    model.save_pretrained(tmp_path / "saved")
    assert model.quantization_method == "marlin"
    verified = marlin.verify(tmp_path / "saved", source.directory, progress=False)
    assert verified.equal, verified.mismatches
    assert_equal_states(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


@every_format
@pytest.mark.parametrize("device_map", ["auto", "device"])
def test_devices(tmp_path: Path, form: str, device: str, device_map: str) -> None:
    pytest.importorskip("accelerate")
    source = write_original(tmp_path / "src", form)
    places = device if device_map == "device" else "auto"
    model = load(source.directory, device_map=places)
    if device_map == "device":
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}
    tokens = TOKENS.to(model.device)
    want = load_converted(source.directory, tmp_path / "dst").to(model.device)
    assert_equal_states(model, want)
    assert torch.equal(model(tokens).logits, want(tokens).logits)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded(tmp_path: Path, device: str, place: str, offload_buffers: bool) -> None:
    """accelerate keeps buffers where they are used unless it is told to offload them, too."""
    pytest.importorskip("accelerate")
    if device == place:
        pytest.skip("nothing is offloaded from the CPU to itself")
    source = write_original(tmp_path / "src", tied=False)
    here = 0 if device == "cuda" else "cpu"
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head")
    options = {
        "device_map": {**dict.fromkeys(names, here), "model.layers.1": place},
        "offload_folder": tmp_path / "offload",
        "offload_buffers": offload_buffers,
    }
    if offload_buffers:
        with pytest.raises(CheckpointError, match=r"layers\.1\..*: offloaded before it was packed"):
            load(source.directory, **options)
        return
    model = load(source.directory, **options)
    assert type(model.model.layers[1].mlp.up_proj) is MarlinLinear
    assert model.model.layers[1].mlp.up_proj._hf_hook.offload
    want = load_converted(source.directory, tmp_path / "dst").to(device)
    assert torch.equal(model(TOKENS.to(device)).logits, want(TOKENS.to(device)).logits)


@every_format
def test_without_the_head(tmp_path: Path, form: str) -> None:
    source = write_original(tmp_path / "src", form)
    base = load(source.directory, AutoModel)
    assert_equal_states(base, load(source.directory).model)
    base.save_pretrained(tmp_path / "base")
    assert_equal_states(base, AutoModel.from_pretrained(tmp_path / "base"))


class TestDtypes:
    @every_format
    def test_another_one(self, tmp_path: Path, form: str) -> None:
        source = write_original(tmp_path / "src", form)
        with pytest.warns(UserWarning, match="layers .model.*pass dtype=torch.float16 to keep"):
            model = load(source.directory, dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="pass dtype=torch.float16 to keep"):
            want = load_converted(source.directory, tmp_path / "dst", dtype=torch.bfloat16)
        assert_equal_states(model, want)

    @pytest.mark.parametrize("leaf", ["scales", "bias"])
    def test_fp32_becomes_the_dtype_of_the_model(self, tmp_path: Path, leaf: str) -> None:
        name = f"model.layers.0.self_attn.q_proj.{leaf}"
        source = write_original(tmp_path / "src")
        changed = read_all(source.directory)
        changed[name] = changed[name].float() + (1e-5 if leaf == "bias" else 0)
        write_tensors(source.directory, changed)
        with pytest.raises(CheckpointError, match=r"pass dtype=torch\.float16"):
            marlin.convert(source.directory, tmp_path / "dst", progress=False)
        model = load(source.directory)
        marlin.convert(source.directory, tmp_path / "dst", progress=False, dtype=torch.float16)
        assert_equal_states(model, AutoModelForCausalLM.from_pretrained(tmp_path / "dst"))

    def test_that_no_kernel_takes(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src")
        with pytest.raises(TypeError, match=r"got torch\.float32.*pass dtype=torch\.float16"):
            load(source.directory, dtype=torch.float32)


def settings(**changes: Any) -> Damage:
    def damage(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        config["quantization_config"] |= changes
        (root / "config.json").write_text(json.dumps(config))

    return damage


def add_shard(root: Path) -> None:
    save_file({"a": torch.zeros(1)}, root / "stray.safetensors")


CASES: dict[str, tuple[str, Damage]] = {
    "scale NaN": ("gptq", poke(f"{LAYER}.scales", (0, 3), float("nan"))),
    "order": ("gptq", poke(f"{LAYER}.g_idx", (5,), 77)),
    "zero points": ("gptq", put(f"{LAYER}.qzeros", lambda t: t[:-1])),
    "tensor lost": ("gptq", tensors(lambda t: t.pop(f"{LAYER}.scales"))),
    "tensor too many": ("gptq", tensors(lambda t: t.update({f"{LAYER}.weight": torch.ones(2)}))),
    "8 bits": ("gptq", settings(bits=8)),
    "another packing": ("gptq", settings(checkpoint_format="exl2")),
    "settings that disagree": ("gptq", text("quantize_config.json", '{"bits": 3}')),
    "second file": ("gptq", add_shard),
    "one byte lost": (
        "gptq",
        lambda root: (root / "model.safetensors").write_bytes(
            (root / "model.safetensors").read_bytes()[:-1]
        ),
    ),
    "another version": ("awq", settings(version="gemv")),
    "group size": ("awq", settings(group_size=64)),
    "activations": ("compressed-tensors", settings(format="int-quantized")),
    "order of groups": ("compressed-tensors", poke(f"{LAYER}.weight_g_idx", (0,), 1)),
    "places": ("marlin-24", poke(f"{LAYER}.meta", (0, 0), 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_as_by_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """In its words, and before a tensor is loaded."""
    form, damage = CASES[case]
    source = write_original(tmp_path / "src", form)
    damage(source.directory)
    with pytest.raises(CheckpointError) as wanted:
        marlin.convert(source.directory, tmp_path / "dst", progress=False)

    def loads(*args: object, **kwargs: object) -> None:
        raise AssertionError("tensors are loaded")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", loads)
    with pytest.raises(CheckpointError) as caught:
        load(source.directory)
    assert str(caught.value) == str(wanted.value)


class TestRefusals:
    def test_part_of_a_checkpoint(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src", shards=2)
        files = sorted(source.directory.glob("*.safetensors"))
        with pytest.raises(CheckpointError, match=r"consists of model-00001.*, and model-00002"):
            open_source(files[1:], torch.float16)

    def test_modules_that_the_model_lacks(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src")
        with pytest.raises(CheckpointError) as caught:
            load(source.directory, num_hidden_layers=1)
        assert len(caught.value.refusals) == 7
        assert "the checkpoint has this layer, the model has no module" in str(caught.value)

    def test_tied_head_in_4_bits(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src", tied=False, head=True)
        with pytest.raises(CheckpointError, match="lm_head: the model ties this layer's weight"):
            load(source.directory, tie_word_embeddings=True)
        assert type(load(source.directory).lm_head) is MarlinLinear

    def test_a_state_dict(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src")
        config = import_module("transformers").AutoConfig.from_pretrained(source.directory)
        kind = import_module("transformers").LlamaForCausalLM
        with pytest.raises(CheckpointError, match="from_pretrained was given a state_dict"):
            load(None, kind, config=config, state_dict=read_all(source.directory), dtype="float16")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_memory_beside_the_model_is_that_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """14 layers of 2 MB and more are packed."""
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 2048, "intermediate_size": 2048, "head_dim": 1024}
    source = write_original(tmp_path / "src", form, **sizes, num_key_value_heads=2)
    pack, grown = integration.pack_layers, []

    def measured(*arguments: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pack(*arguments)
        grown.append(torch.cuda.max_memory_allocated() - before)

    monkeypatch.setattr(integration, "pack_layers", measured)
    load(source.directory, device_map="cuda")
    assert grown[0] < 12 * 2**20


class TestScope:
    def registered(self) -> list[Any]:
        return [
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            for method in ("gptq", "awq", "compressed-tensors", "marlin")
        ]

    def test_only_in_the_block(self) -> None:
        usual = self.registered()
        with pytest.raises(KeyError), integration.repacking():  # noqa: PT012
            with integration.repacking():
                assert self.registered() != usual
            assert self.registered() != usual
            raise KeyError
        assert self.registered() == usual

    def test_threads(self) -> None:
        """Blocks of two threads do not put back what the other one has put there."""
        usual, inside = self.registered(), threading.Event()

        def enter() -> None:
            with integration.repacking():
                inside.set()

        with integration.repacking():
            thread = threading.Thread(target=enter)
            thread.start()
            assert not inside.wait(0.05)
        thread.join()
        assert inside.is_set()
        assert self.registered() == usual

    def test_others_are_loaded_as_usual(self, tmp_path: Path) -> None:
        source = write_original(tmp_path / "src")
        want = load_converted(source.directory, tmp_path / "dst")
        assert_equal_states(load(tmp_path / "dst"), want)
        plain = load(ROOT / "tests/data/demo/fp16")
        assert not any(isinstance(module, MarlinLinear) for module in plain.modules())
