"""A small trained model in every format: logits against exact ones, and 200 tokens of greedy text.

Two checkpoints were written by GPTQModel; the others are the demo model's weights, rounded and
written by the tests' own code. What the weights are is taken from the integers, scales and zero
points that were written, by arithmetic that shares nothing with the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    GptqLayer,
    awq_config,
    awq_tensors,
    ct_config,
    ct_tensors,
    gptq_config,
    read_all,
    write_checkpoint,
)
from test_convert import _by_definition
from test_convert_marlin_24 import SparseLayer, config_24, sparse_tensors
from torch import Tensor

import marlin

transformers = pytest.importorskip("transformers", minversion="5.0")
integration = import_module("marlin.integrations.transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

transformers.utils.logging.disable_progress_bar()

DEMO = Path(__file__).parent / "data" / "demo"
WINDOW = 256  # tokens, all that the model can see
NEW_TOKENS = 200
# Of the largest logit. fp16 roundings along three layers: a fp16 model of the same weights has as
# much (test_logits asserts it).
BOUND = 2e-3


def rounded(
    weight: Tensor, group_size: int, *, sym: bool = True, order: bool = False, sparse: bool = False
) -> GptqLayer:
    """``weight`` [N, K] rounded to nearest; ``order`` shuffles the features among the groups."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    g_idx = torch.arange(k) // size
    if order:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    places = weight.abs().view(n, -1, 4).topk(2).indices.sort().values
    if sparse:
        kept = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter(2, places, True)
        weight = weight * kept.view(n, k)
    grouped = weight[:, g_idx.argsort(stable=True)].view(n, -1, size)
    if sym:
        scales = (grouped.abs().amax(-1) / 7.5).half()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round()
    q = weight / scales.float()[:, g_idx] + zeros.float()[:, g_idx]
    layer = (SparseLayer if sparse else GptqLayer)(
        q=q.round().clamp(0, 15).to(torch.uint8),
        zeros=zeros.T.to(torch.uint8).contiguous(),
        scales=scales.T.contiguous(),
        g_idx=g_idx.int(),
        group_size=group_size,
    )
    if isinstance(layer, SparseLayer):
        layer.places = places
    return layer


@dataclass(frozen=True)
class Written:
    """A format that the demo model's weights are written in."""

    config: dict[str, Any]
    round: Callable[[Tensor], GptqLayer]
    tensors_of: Callable[[GptqLayer], dict[str, Tensor]] | None = None


WRITTEN = {
    "gptq": Written(gptq_config(sym=False), partial(rounded, group_size=32, sym=False)),
    "awq": Written(awq_config(64), partial(rounded, group_size=64, sym=False), awq_tensors),
    "pack-quantized": Written(
        ct_config(32, symmetric=False, actorder="group"),
        partial(rounded, group_size=32, sym=False, order=True),
        partial(ct_tensors, order="always"),
    ),
    "pack-quantized-channel": Written(
        ct_config(-1),
        partial(rounded, group_size=-1),
        partial(ct_tensors, zeros="none"),
    ),
    "marlin-24": Written(
        config_24(-1), partial(rounded, group_size=-1, sparse=True), sparse_tensors
    ),
}
THIRD_PARTY = ("gptq-g128", "gptq-g64-actorder")
CONVERTED = {"marlin": "gptq-g64-actorder", "marlin-2:4": "marlin-24"}  # in our own, from these
every_format = pytest.mark.parametrize("form", [*THIRD_PARTY, *WRITTEN, *CONVERTED])


@cache
def demo_config() -> dict[str, Any]:
    return json.loads((DEMO / "fp16" / "config.json").read_text())


def write(directory: Path, written: Written) -> dict[str, GptqLayer]:
    """The demo model in ``directory``, and its layers as they are written there."""
    model = read_all(DEMO / "fp16")
    layers = {
        name.removesuffix(".weight"): written.round(model.pop(name).float())
        for name in list(model)
        if name.endswith("_proj.weight")
    }
    config = demo_config() | {"quantization_config": written.config["quantization_config"]}
    write_checkpoint(directory, layers, config=config, others=model, tensors_of=written.tensors_of)
    return layers


def third_party_layers(directory: Path) -> dict[str, GptqLayer]:
    tensors = read_all(directory)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {name: _by_definition(tensors, name, minus_one=True) for name in names}


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, dict[str, GptqLayer]]]:
    """A folder in a format, and what its layers hold."""

    @cache
    def of(form: str) -> tuple[Path, dict[str, GptqLayer]]:
        if form in THIRD_PARTY:
            return DEMO / form, third_party_layers(DEMO / form)
        folder = tmp_path_factory.mktemp("accuracy") / form
        if form not in CONVERTED:
            return folder, write(folder, WRITTEN[form])
        source, layers = of(CONVERTED[form])
        marlin.convert(source, folder, progress=False)
        return folder, layers

    return of


@pytest.fixture
def models(
    form: str, checkpoint: Callable[[str], tuple[Path, dict[str, GptqLayer]]], device: str
) -> tuple[Any, dict[str, GptqLayer]]:
    """The model with packed layers, as a user gets it, and what its layers hold."""
    folder, layers = checkpoint(form)
    with integration.repacking():
        model = AutoModelForCausalLM.from_pretrained(folder)
    kinds = (marlin.MarlinLinear, marlin.MarlinLinear24)
    assert sum(isinstance(module, kinds) for module in model.modules()) == len(layers) == 21
    return model.to(device), layers


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """In so small a model two threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dequantized(layers: dict[str, GptqLayer], dtype: torch.dtype, device: str) -> Any:
    """The model of the same weights, multiplied by torch."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "fp16", dtype=dtype)
    with torch.no_grad():
        for name, layer in layers.items():
            model.get_parameter(f"{name}.weight").copy_(layer.weight())
    return model.to(device)


@cache
def heldout() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "fp16")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000]
    tokens: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return tokens


@every_format
@torch.no_grad()
def test_logits(models: tuple[Any, dict[str, GptqLayer]], device: str, form: str) -> None:
    model, layers = models
    windows = heldout()[: 2 * WINDOW].view(2, WINDOW).to(device)
    exact = dequantized(layers, torch.float32, device)(windows).logits
    largest = exact.abs().max()

    def error(of: Any) -> float:
        return float((of(windows).logits.float() - exact).abs().max() / largest)

    ours, theirs = error(model), error(dequantized(layers, torch.float16, device))
    print(f"{form}: {ours:.2e} of the largest logit; a fp16 model's: {theirs:.2e}")
    assert ours < BOUND
    assert ours < 1.5 * theirs


@torch.no_grad()
def greedy(model: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that follow, [batch, NEW_TOKENS], and the logits [NEW_TOKENS, batch, tokens]."""
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return found.sequences[:, prompts.size(1) :], torch.stack(found.scores).float()


@every_format
def test_greedy_text(models: tuple[Any, dict[str, GptqLayer]], device: str, form: str) -> None:
    """That of a fp16 model of the same weights, up to where two tokens are as good as each other.

    The texts have nothing in common from there on.
    """
    model, layers = models
    prompts = heldout()[: 4 * WINDOW].view(4, WINDOW)[:, :40].to(device)
    (texts, _), (wanted, logits) = (
        greedy(each, prompts) for each in (model, dequantized(layers, torch.float16, device))
    )
    assert texts.shape == wanted.shape == (4, NEW_TOKENS)
    for prompt in range(4):
        differ = (texts[prompt] != wanted[prompt]).nonzero()
        if not len(differ):
            print(f"{form}, prompt {prompt}: {NEW_TOKENS} equal tokens")
            continue
        first = int(differ[0])
        chosen = logits[first, prompt]
        gap = float(chosen.max() - chosen[texts[prompt, first]])
        bound = BOUND * float(chosen[chosen.isfinite()].abs().max())
        print(f"{form}, prompt {prompt}: token {first} differs, a gap of {gap:.4f} of {bound:.4f}")
        assert gap <= bound
        assert (chosen >= chosen[texts[prompt, first]]).sum() <= 2  # of the best two
