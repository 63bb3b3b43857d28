"""The main job on real data: converts GPTQ checkpoints of a small language model, verifies them,
loads them into ``MarlinLinear`` layers, generates text, and says what was gained and lost. Then the
same model pruned to 2:4, in ``MarlinLinear24`` layers.

    make demo                 sets everything up first
    python tests/demo.py      where marlin, transformers and tokenizers are installed

Runs on the GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import marlin

DATA = Path(__file__).parent / "data" / "demo"
CHECKPOINTS = ("gptq-g128", "gptq-g64-actorder")
WINDOW = 256  # tokens per evaluation window
PROMPT = "def read_config(path):\n"
SPARSE = "2:4-magnitude"
PACKED = (marlin.MarlinLinear, marlin.MarlinLinear24)


def convert(source: Path, target: Path) -> None:
    """Converts and verifies a checkpoint, as ``marlin convert`` and ``marlin verify`` do."""
    report = marlin.convert(source, target)
    verified = marlin.verify(target, source)
    if not verified.equal:
        raise SystemExit(
            f"{source.name}: the converted checkpoint differs: {verified.mismatches[0]}"
        )
    print(
        f"{source.name}: converted and verified {len(report.layers)} layers in "
        f"{report.seconds:.1f} s, {report.bytes_before:,} -> {report.bytes_after:,} bytes"
    )


def load_fp16(device: torch.device) -> tuple[Any, Any]:
    """The original model in fp16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # the evaluation text is longer than the model's window: intended
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "fp16")
    model = AutoModelForCausalLM.from_pretrained(DATA / "fp16", dtype=torch.float16)
    return model.to(device).eval(), tokenizer


def load_marlin(directory: Path, device: torch.device) -> Any:
    """A converted checkpoint in a model built from its config, without its fp16 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(DATA / "fp16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    return marlin.load(model, directory, device=device).eval()


def pruned(original: nn.Module) -> nn.Module:
    """The model with the two smallest of every four weights left out, the others in 4 bits."""
    model = copy.deepcopy(original)
    report = marlin.replace_linear(model, group_size=128, sparse=True, prune="magnitude")
    print(
        f"{SPARSE}: pruned and rounded {len(report.replaced)} layers, {report.bytes_before:,} -> "
        f"{report.bytes_after:,} bytes"
    )
    return model


def dequantized_twin(model: nn.Module) -> nn.Module:
    """The same model with every packed layer replaced by an fp32 ``nn.Linear`` of its weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, PACKED):
            linear = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            linear.weight.data = exact_weight(module)
            if module.bias is not None:
                linear.bias.data = module.bias.float()
            twin.set_submodule(name, linear)
    return twin.float()


def exact_weight(layer: marlin.MarlinLinear | marlin.MarlinLinear24) -> Tensor:
    """(q - z) * s in fp32, which holds it exactly, from the unpacked integers: [N, K]."""
    n, k = layer.out_features, layer.in_features
    if layer.sparse:
        q, stored = torch.ops.marlin.unpack_24(layer.qweight, layer.places, n, k)
    else:
        q, stored = torch.ops.marlin.unpack(layer.qweight, n, k), None
    size = k if layer.scales.size(0) == 1 else layer.group_size
    group = torch.arange(k, device=q.device) // size
    zero = 8.0 if layer.zeros is None else layer.zeros.float()[group].T
    weight = (q.float() - zero) * layer.scales.float()[group].T
    if stored is not None:
        return weight.where(stored, 0)
    if layer.perm is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, layer.perm.long(), weight)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """exp of the mean next-token cross-entropy over non-overlapping windows of 256 tokens."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for batch in windows.split(16):
        logits = model(batch).logits.float()
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (windows.size(0) * (WINDOW - 1)))


@torch.no_grad()
def largest_error(model: Any, tokens: Tensor) -> tuple[float, float]:
    """The largest |logit - fp32 twin's logit| on one window, and the twin's largest |logit|."""
    window = tokens[None, :WINDOW]
    exact = dequantized_twin(model)(window).logits
    error = (model(window).logits.float() - exact).abs().max().item()
    return error, exact.abs().max().item()


def generate(model: Any, tokenizer: Any, count: int) -> tuple[str, float]:
    """PROMPT continued by ``count`` sampled tokens, and how many came per second."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(next(model.buffers()).device)
    options = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "pad_token_id": 0,
        "max_new_tokens": count,
        "min_new_tokens": count,
    }
    model.generate(**inputs, **options)  # the first run loads libraries and kernels
    torch.manual_seed(0)
    begin = time.perf_counter()
    output = model.generate(**inputs, **options)
    if output.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return tokenizer.decode(output[0], skip_special_tokens=True), count / seconds


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the transformer's linear layers; embeddings and lm_head are not counted."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *PACKED)) and "lm_head" not in name:
            tensors = [*module.parameters(), *module.buffers()]
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def main() -> int:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=100, help="how many to generate")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.manual_seed(0)

    original, tokenizer = load_fp16(device)
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0].to(device)
    rows = []

    def measure(label: str, model: Any, error: str) -> str:
        layers = sum(isinstance(m, PACKED) for m in model.modules())
        sample, speed = generate(model, tokenizer, arguments.tokens)
        rows.append(
            (label, str(layers), f"{linear_bytes(model):,}", error,
             f"{perplexity(model, tokens):.3f}", f"{speed:.0f}")
        )  # fmt: skip
        return sample

    def measure_packed(label: str, model: Any) -> str:
        error, scale = largest_error(model, tokens)
        return measure(label, model, f"{error:.4f} of {scale:.1f}")

    measure("fp16", original, "")
    with tempfile.TemporaryDirectory() as scratch:
        for checkpoint in CHECKPOINTS:
            source, target = DATA / checkpoint, Path(scratch) / checkpoint
            convert(source, target)
            model = load_marlin(target, device)
            sample = measure_packed(checkpoint, model)
    sparse = pruned(original)
    measure_packed(SPARSE, sparse)

    print(model.model.layers[0])
    print(sparse.model.layers[0].mlp.down_proj)
    print(f"\n--- {checkpoint}, sampled, on {name} ---\n{sample}\n---\n")
    header = (
        "model",
        "4-bit layers",
        "bytes of linears",
        "largest logit error",
        "perplexity",
        "tokens/s",
    )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(
        "\nlogit error: against the same integers and scales dequantised to fp32, one window of "
        f"{WINDOW} tokens\nperplexity: {len(tokens)} held-out tokens; device: {name}\n"
        f"{SPARSE}: half of the weights dropped by size alone, which costs the perplexity that is "
        "shown;\n  choosing them, and correcting the others, by calibration data comes next"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
