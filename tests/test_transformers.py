"""Converted checkpoints through transformers: loaded, saved, trained on, refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import read_all, write_tensors
from torch import Tensor, nn

import marlin
from marlin import CheckpointError, MarlinLinear, MarlinLinear24, parallel
from marlin.parallel import Row, RowParallelMarlinLinear, parallelize

transformers = pytest.importorskip("transformers", minversion="5.0")
integration = import_module("marlin.integrations.transformers")

from tiny_llama import (  # noqa: E402
    TOKENS,
    add_adapter,
    assert_equal_states,
    exact_model,
    write_llama,
)
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

DEMO = Path(__file__).parent / "data" / "demo"
UP, DOWN, ORDERED = (
    f"model.layers.0.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
)

ALL_BUT_LAYER_1 = (
    "model.embed_tokens",
    "model.norm",
    "model.rotary_emb",
    "model.layers.0",
    "lm_head",
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def edit_quantization(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


class TestLoading:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_values(self, tmp_path: Path, tied: bool, shards: int, device: str) -> None:
        source = write_llama(tmp_path / "dst", tied=tied, shards=shards)
        assert (len(list((tmp_path / "dst").glob("*.safetensors"))) > 1) == (shards > 1)
        model, info = load(source.directory, output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == torch.float16
        assert not model.training
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.to(device)
        with torch.no_grad():
            want = exact_model(source)(TOKENS).logits
            got = model(TOKENS.to(device)).logits.float().cpu()
        torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))

    def test_layers(self, tmp_path: Path) -> None:
        model = load(write_llama(tmp_path / "dst").directory)
        up, down, ordered = (model.get_submodule(name) for name in (UP, DOWN, ORDERED))
        assert type(up) is type(down) is MarlinLinear24
        assert type(ordered) is MarlinLinear
        assert type(model.lm_head) is nn.Linear
        dtypes = {name: buffer.dtype for name, buffer in down.named_buffers()}
        assert dtypes == {
            "qweight": torch.int32,
            "places": torch.int32,
            "scales": torch.float16,
            "zeros": torch.uint8,
        }
        assert up.zeros is None
        assert ordered.perm.dtype == torch.int32
        assert ordered.bias.dtype == torch.float16
        assert not any(True for _ in ordered.parameters())
        assert all(t.data_ptr() % 16 == 0 for t in model.buffers())

    @pytest.mark.parametrize("sparse", [False, True])
    def test_both_loaders_agree(self, tmp_path: Path, sparse: bool) -> None:
        source = write_llama(tmp_path / "dst", sparse=sparse)
        quantization = json.loads((source.directory / "config.json").read_text())
        assert quantization["quantization_config"]["format_version"] == (2 if sparse else 1)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig(**config))
        assert_equal_states(load(source.directory), marlin.load(plain, source.directory))

    def test_head_in_4_bits(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst", tied=False, head=True)
        model = load(source.directory)
        assert type(model.lm_head) is MarlinLinear
        want = exact_model(source)(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits.float(), want, rtol=0, atol=0.05)

    def test_tied_head_in_4_bits_is_refused(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst", tied=False, head=True)
        with pytest.raises(CheckpointError, match="lm_head: the model ties this layer's weight"):
            load(source.directory, tie_word_embeddings=True)

    def test_generation_on_the_demo(self, tmp_path: Path, device: str) -> None:
        marlin.convert(DEMO / "gptq-g64-actorder", tmp_path / "dst", progress=False)
        model = load(tmp_path / "dst").to(device)
        plain = AutoModelForCausalLM.from_pretrained(DEMO / "fp16", dtype=torch.float16)
        other = marlin.load(plain, tmp_path / "dst", device=device).eval()
        prompt = TOKENS.to(device)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        got = model.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(got, other.generate(prompt, attention_mask=mask, **options))
        assert got.shape[0] == 2
        assert got.shape[1] > prompt.shape[1]


class TestSaving:
    @pytest.mark.parametrize("tied", [True, False])
    def test_same_bits_again(self, tmp_path: Path, tied: bool) -> None:
        source = write_llama(tmp_path / "dst", tied=tied)
        model = load(source.directory)
        model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert_equal_states(model, load(tmp_path / "again"))
        one, other = read_all(source.directory), read_all(tmp_path / "again")
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        quantization = [
            json.loads((folder / "config.json").read_text())["quantization_config"]
            for folder in (source.directory, tmp_path / "again")
        ]
        assert quantization[0] == quantization[1]

    def test_without_the_head(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        whole, base = load(source.directory), AutoModel.from_pretrained(source.directory)
        assert_equal_states(whole.model, base)
        base.save_pretrained(tmp_path / "base")
        assert_equal_states(base, AutoModel.from_pretrained(tmp_path / "base"))
        assert_equal_states(base, load(tmp_path / "base").model)


class TestDtypes:
    def test_asked_for(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        with pytest.warns(UserWarning, match=r"layers \(model.*pass dtype=torch.float16 to keep"):
            model = load(source.directory, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        want = load(source.directory)
        for name in (UP, DOWN, ORDERED):
            layer = want.get_submodule(name).to(torch.bfloat16)
            assert_equal_states(model.get_submodule(name), layer)
        assert model(TOKENS).logits.isfinite().all()

    def test_of_the_checkpoint(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst", dtype=torch.bfloat16)
        model = load(source.directory)
        assert model.get_submodule(UP).scales.dtype == model.dtype == torch.bfloat16
        assert torch.equal(model.get_submodule(UP).scales, source.layers[UP].scales)

    def test_that_no_kernel_takes(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        with pytest.raises(TypeError, match=r"got torch\.float32.*pass dtype=torch\.float16"):
            load(source.directory, dtype=torch.float32)

    def test_that_cannot_hold_the_scales(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst", dtype=torch.bfloat16)
        tensors = read_all(source.directory)
        tensors[f"{UP}.scales"][0, 3] = 1e6
        write_tensors(source.directory, tensors)
        with pytest.raises(ValueError, match=rf"{UP}: got a cast to torch\.float16 with scales up"):
            load(source.directory, dtype=torch.float16)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            (f"{ORDERED}.perm", 3, "perm is not a permutation"),
            (f"{DOWN}.zeros", 16, "zeros holds 16"),
            (f"{UP}.scales", float("nan"), "scales holds a number that is not finite"),
            (f"{UP}.places", 0, "rise"),
        ],
    )
    def test_damaged_values(self, tmp_path: Path, name: str, value: float, reason: str) -> None:
        source = write_llama(tmp_path / "dst")
        tensors = read_all(source.directory)
        tensors[name].view(-1)[5] = value
        write_tensors(source.directory, tensors)
        with pytest.raises(CheckpointError, match=rf"{name.rpartition('.')[0]}: .*{reason}"):
            load(source.directory)

    def test_tensors_that_do_not_fit(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        tensors = read_all(source.directory)
        del tensors[f"{UP}.places"]
        tensors[f"{ORDERED}.scales"] = tensors[f"{ORDERED}.scales"][:-1].clone()
        tensors[f"{DOWN}.qweight"] = tensors[f"{DOWN}.qweight"].long()
        tensors["model.layers.7.up.qweight"] = torch.zeros(1, dtype=torch.int32)
        write_tensors(source.directory, tensors)
        with pytest.raises(CheckpointError) as caught:
            load(source.directory)
        text = "\n".join(caught.value.refusals)
        assert len(caught.value.refusals) == 4
        assert f"{UP}: places is missing" in text
        assert f"{ORDERED}: scales is F16 [1, 64], want F16 [2, 64]" in text
        assert f"{DOWN}: qweight is I64" in text
        assert "model.layers.7.up: has a qweight but config.json does not list it" in text

    def test_modules_that_the_model_lacks(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        with pytest.raises(CheckpointError) as caught:
            load(source.directory, num_hidden_layers=1)
        assert len(caught.value.refusals) == 7
        assert "layers.1.self_attn.q_proj: the checkpoint has this layer, the model" in str(
            caught.value
        )

    def test_another_model(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        with pytest.raises(CheckpointError, match=r"up_proj: the model's layer is 64 -> 192"):
            load(source.directory, intermediate_size=192)

    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (lambda q: q.pop("format_version"), "the packing of the original Marlin kernel"),
            (lambda q: q.update(format_version=3), "format_version is 3; this version of marlin"),
            (lambda q: q.update(bits=8), "bits is 8, want 4"),
            (lambda q: q.update(modules=[]), "modules is"),
        ],
    )
    def test_configurations(
        self, tmp_path: Path, edit: Callable[[dict[str, Any]], object], reason: str
    ) -> None:
        source = write_llama(tmp_path / "dst")
        edit_quantization(source.directory, edit)
        with pytest.raises(CheckpointError, match=reason):
            load(source.directory)

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        file = source.directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="truncated"):
            load(source.directory)

    def test_a_state_dict(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst")
        config = transformers.AutoConfig.from_pretrained(source.directory)
        with pytest.raises(CheckpointError, match="give the folder of a converted checkpoint"):
            LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=read_all(source.directory), dtype=torch.float16
            )

    def test_a_checkpoint_that_is_not_quantized(self, tmp_path: Path) -> None:
        from marlin.integrations.transformers import MarlinConfig

        config = MarlinConfig(format_version=1, bits=4, modules={})
        with pytest.raises(ValueError, match=r"marlin convert.*marlin\.replace_linear"):
            load(DEMO / "fp16", quantization_config=config)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_replaced_layers_are_saved(tmp_path: Path, sparse: bool, fused: bool) -> None:
    model = load(DEMO / "fp16", dtype=torch.float16)
    options = {"sparse": True, "prune": "magnitude"} if sparse else {}
    marlin.replace_linear(model, **options)
    if fused:
        assert marlin.fuse(model).fused
    integration.prepare_to_save(model)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again.get_submodule(UP)) is (MarlinLinear24 if sparse else MarlinLinear)
    assert_equal_states(again, model)
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    again.save_pretrained(tmp_path / "again")
    assert_equal_states(load(tmp_path / "again"), model)


def assert_is_saved_once_prepared(model: Any, folder: Path) -> None:
    integration.prepare_to_save(model)
    model.save_pretrained(folder)
    assert_equal_states(load(folder), model)


@pytest.mark.parametrize("loaded", [False, True])
def test_layers_that_have_changed_since(tmp_path: Path, loaded: bool) -> None:
    model = load(DEMO / "fp16", dtype=torch.float16)
    marlin.replace_linear(model, skip=("lm_head", "*.layers.1.*"))
    integration.prepare_to_save(model)
    if loaded:
        model.save_pretrained(tmp_path / "loaded")
        model = load(tmp_path / "loaded")
    plain = model.model.layers[1].mlp.up_proj
    marlin.replace_linear(model)
    refused = r"layers\.1\..* is packed, and not listed.*prepare_to_save\(model\)"
    with pytest.raises(ValueError, match=refused):
        model.save_pretrained(tmp_path / "saved")
    integration.prepare_to_save(model)
    model.model.layers[1].mlp.up_proj = plain
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is not packed, but listed"):
        model.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []
    assert_is_saved_once_prepared(model, tmp_path / "saved")


@pytest.mark.parametrize("loaded", [False, True])
def test_layers_that_nobody_has_listed(tmp_path: Path, loaded: bool) -> None:
    """Without the configuration they would be loaded as layers of random weights."""
    model = load(DEMO / "fp16", dtype=torch.float16)
    marlin.replace_linear(model)
    if loaded:
        integration.prepare_to_save(model)
        model.save_pretrained(tmp_path / "converted")
        model = marlin.load(load(DEMO / "fp16", dtype=torch.float16), tmp_path / "converted")
    model = copy.deepcopy(model)
    refused = r" model\.layers\.0\..* is packed, and not listed.*prepare_to_save\(model\)"
    with pytest.raises(ValueError, match=refused):
        model.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []
    assert_is_saved_once_prepared(model, tmp_path / "saved")


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_inside_another(tmp_path: Path, loaded: bool) -> None:
    """It has the other's configuration, with the other's names of the layers."""
    whole = load(DEMO / "fp16", dtype=torch.float16)
    marlin.replace_linear(whole)
    integration.prepare_to_save(whole)
    if loaded:
        whole.save_pretrained(tmp_path / "loaded")
        whole = load(tmp_path / "loaded")
    refused = r" layers\.0\..* is packed, and not listed.* part of such a model.*prepare_to_save"
    with pytest.raises(ValueError, match=refused):
        whole.model.save_pretrained(tmp_path / "base")
    assert list((tmp_path / "base").iterdir()) == []
    integration.prepare_to_save(whole.model)
    whole.model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    assert_equal_states(base, whole.model)
    with pytest.raises(ValueError, match=r" model\.layers\.0\..* is packed, and not listed"):
        whole.save_pretrained(tmp_path / "whole")
    assert_is_saved_once_prepared(whole, tmp_path / "whole")


def test_names_that_were_others_once(tmp_path: Path) -> None:
    """A Llava's layers have other names than in the checkpoints that it was published with."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(intermediate_size=128, vocab_size=72, **sizes)
    vision = transformers.CLIPVisionConfig(
        intermediate_size=64, image_size=28, patch_size=14, **sizes
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=70)
    model = transformers.LlavaForConditionalGeneration(config).half()
    layer = "model.language_model.layers.0.mlp.up_proj"
    marlin.replace_linear(model, skip=("lm_head", "*.vision_tower.*"))
    integration.prepare_to_save(model)
    for folder in (tmp_path / "saved", tmp_path / "again"):
        model.save_pretrained(folder)
        assert f"{layer}.qweight" in read_all(folder)
        again = type(model).from_pretrained(folder)
        assert type(again.get_submodule(layer)) is MarlinLinear
        assert_equal_states(again, model)
        model = again


def test_an_fp32_model_is_not_saved(tmp_path: Path) -> None:
    model = load(DEMO / "fp16", dtype=torch.float32)
    marlin.replace_linear(model)  # in fp16, whatever the others are
    integration.prepare_to_save(model)
    with pytest.raises(ValueError, match=r"got a model in torch\.float32.*model\.to\(torch"):
        model.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []
    model.half().save_pretrained(tmp_path / "saved")
    assert_equal_states(load(tmp_path / "saved"), model)
    model.model.norm.float()  # as some models keep a few parameters
    model.save_pretrained(tmp_path / "mixed")


def test_adapters_alone_are_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import_module("marlin.integrations.peft")
    model = load(write_llama(tmp_path / "dst").directory)
    add_adapter(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    assert list((tmp_path / "adapter").glob("adapter*"))
    with pytest.raises(ValueError, match=r"an adapter around model\.layers\.0\..*q_proj; adapters"):
        integration.prepare_to_save(model)


def test_what_cannot_be_prepared_to_be_saved() -> None:
    with pytest.raises(TypeError, match="model: got Sequential; it must be a PreTrainedModel"):
        integration.prepare_to_save(nn.Sequential(MarlinLinear(64, 64)))
    model = load(DEMO / "fp16", dtype=torch.float16)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model.hf_quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config)
    with pytest.raises(ValueError, match="Bnb8BitHfQuantizer of transformers has quantized"):
        integration.prepare_to_save(model)
    del model.hf_quantizer
    with pytest.raises(ValueError, match=r"without packed layers.*marlin\.replace_linear"):
        integration.prepare_to_save(model)
    marlin.replace_linear(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallelize(model, {"o_proj": Row()})
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="rank's parts of layers"):
        integration.prepare_to_save(model)


def by_hand(directory: Path) -> nn.Module:
    model = load(directory)
    attention = model.model.layers[0].self_attn
    attention.o_proj = RowParallelMarlinLinear.from_layer(attention.o_proj)
    return model


def loaded_in_parts(directory: Path) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    return parallel.load(model, directory, {"o_proj": Row()})


@pytest.mark.parametrize(
    "make",
    [
        by_hand,
        loaded_in_parts,
        lambda directory: copy.deepcopy(parallelize(load(directory), {"o_proj": Row()})),
        lambda directory: parallelize(load(directory), {"o_proj": Row()}).model,
    ],
    ids=["by hand", "loaded", "copied", "base"],
)
def test_parts_of_ranks_are_not_saved(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    source = write_llama(tmp_path / "dst")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make(source.directory)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"rank's parts of layers.*copy the folder that"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*"))
    if make is not by_hand:  # transformers makes the folder first
        assert not (tmp_path / "saved").exists()


class Adapter(nn.Module):
    """LoRA by hand: ``base(x) + up(down(x))``, the base frozen."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # 5.0 has no other
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_on_a_frozen_base(tmp_path: Path, device: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = load(write_llama(tmp_path / "dst", dtype=torch.bfloat16).directory).to(device)
    assert model.hf_quantizer.is_trainable
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    for layer in model.model.layers:  # the first one learns only through the layers above it
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj).to(device)
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj).to(device)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    optimizer = torch.optim.Adam(trained, lr=0.05)
    tokens = TOKENS.to(device)
    losses = []
    for step in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        ups = [m.up.weight.grad for m in model.modules() if isinstance(m, Adapter)]
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in ups), step
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class TestDeviceMap:
    @pytest.fixture(autouse=True)
    def _accelerate(self) -> None:
        pytest.importorskip("accelerate")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("automatic", [False, True])
    @pytest.mark.filterwarnings("ignore:the scales of")
    def test_one_device(
        self, tmp_path: Path, device: str, dtype: torch.dtype, automatic: bool
    ) -> None:
        source = write_llama(tmp_path / "dst")
        model = load(source.directory, dtype=dtype, device_map="auto" if automatic else device)
        if not automatic:
            assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}
        tokens = TOKENS.to(model.device)
        want = load(source.directory, dtype=dtype).to(model.device)(tokens).logits
        assert torch.equal(model(tokens).logits, want)

    @pytest.mark.parametrize("offload_buffers", [False, True])
    @pytest.mark.filterwarnings("ignore:the scales of")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_offloaded(
        self, tmp_path: Path, device: str, offload_buffers: bool, dtype: torch.dtype
    ) -> None:
        from marlin.integrations.transformers import _offloads_integers

        if offload_buffers and not _offloads_integers():
            pytest.skip("this transformers is refused, see test_offloaded_by_an_old_version")
        source = write_llama(tmp_path / "dst", tied=False)
        places = dict.fromkeys(ALL_BUT_LAYER_1, 0 if device == "cuda" else "cpu")
        model = load(
            source.directory,
            dtype=dtype,
            device_map={**places, "model.layers.1": "disk"},
            offload_folder=tmp_path / "offload",
            offload_buffers=offload_buffers,
        )
        layer = model.model.layers[1].mlp.up_proj
        assert layer.qweight.is_meta == offload_buffers
        assert layer.static_weights is (False if offload_buffers else None)
        want = load(source.directory, dtype=dtype).to(device)(TOKENS.to(device)).logits
        assert torch.equal(model(TOKENS.to(device)).logits, want)

    def test_offloaded_by_an_old_version(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = import_module("marlin.integrations.transformers")
        monkeypatch.setattr(module, "_offloads_integers", lambda: False)
        source = write_llama(tmp_path / "dst", tied=False)
        with pytest.raises(RuntimeError, match=r"layers\.\d.*: offloaded, and transformers"):
            load(
                source.directory,
                device_map={**dict.fromkeys(ALL_BUT_LAYER_1, "cpu"), "model.layers.1": "disk"},
                offload_folder=tmp_path / "offload",
                offload_buffers=True,
            )

    @pytest.mark.multi_gpu
    @pytest.mark.gpu
    def test_two_devices(self, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "dst", tied=False)
        first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
        second = ("model.layers.1", "model.norm", "lm_head")
        places = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
        model = load(source.directory, device_map=places)
        assert model.get_submodule(UP).qweight.device.index == 0
        assert model.model.layers[1].mlp.up_proj.qweight.device.index == 1
        want = load(source.directory).to("cuda:0")(TOKENS.to("cuda:0")).logits
        assert torch.equal(model(TOKENS.to("cuda:0")).logits.to("cuda:0"), want)


class TestRequirements:
    @pytest.fixture(autouse=True)
    def _not_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "marlin.integrations.transformers")

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(
            ImportError, match=r"needs transformers >= 5\.0.*marlin\[transformers\]"
        ):
            import_module("marlin.integrations.transformers")

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Not the module above: transformers puts another one in its place as it loads its parts.
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.3")
        with pytest.raises(ImportError, match=r">= 5\.0, found 4\.57\.3: .* or use marlin\.load"):
            import_module("marlin.integrations.transformers")
