#!/usr/bin/env python3
"""Make the demo checkpoints in ``tests/data/demo``: a small real model and its GPTQ versions.

The model is a 2-million-parameter Llama, trained from scratch on the source text of the Python
standard library of the interpreter that runs this script. GPTQModel, a third-party quantiser,
then writes the 4-bit checkpoints, so that what this project reads was not made by this project.

    python make_demo_model.py train       # tokenizer, training, demo/fp16, demo/heldout.txt
    python make_demo_model.py quantize    # demo/gptq-*, needs the package gptqmodel
    python make_demo_model.py evaluate    # held-out perplexity of every checkpoint

``train`` and ``quantize`` write what they did into ``demo/PROVENANCE.json``; ``evaluate --record``
adds the perplexities and the SHA-256 of every file.

Perplexity is exp of the mean next-token cross-entropy (natural logarithm) over ``heldout.txt``,
tokenised as one string without special tokens and cut into consecutive non-overlapping windows of
256 tokens. A last partial window is dropped. Each window is scored on its own: its tokens 2 to 256
are predicted, each from the tokens before it in the same window. Weights are cast to float32 and
the arithmetic is float32.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent / "demo"
END_OF_TEXT = "<|endoftext|>"
WINDOW = 256  # tokens per training sequence and per evaluation window

# Held out of the tokenizer, the training and the calibration; joined they are heldout.txt.
HELD_OUT = (
    "bisect.py",
    "csv.py",
    "fnmatch.py",
    "graphlib.py",
    "queue.py",
    "sched.py",
    "shlex.py",
)
# Not library code, generated tables, or text that names the machine it was built on.
EXCLUDED_PARTS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
EXCLUDED_FILES = ("_sysconfigdata*.py", "html/entities.py", "this.py")


@dataclass(frozen=True)
class TrainSettings:
    """What defines the model and its training."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    steps: int = 2200
    batch: int = 8
    warmup_steps: int = 100
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    seed: int = 20240


@dataclass(frozen=True)
class QuantSettings:
    """One GPTQ checkpoint."""

    group_size: int
    desc_act: bool
    bits: int = 4
    sym: bool = True
    calibration_windows: int = 128
    seed: int = 20241


QUANTIZED = {
    "gptq-g128": QuantSettings(group_size=128, desc_act=False),
    "gptq-g64-actorder": QuantSettings(group_size=64, desc_act=True),
}


# --- text -----------------------------------------------------------------------------------------


def stdlib_files() -> dict[str, Path]:
    """The modules of this interpreter's standard library, by path relative to it, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS.isdisjoint(relative.parts) and not any(
            relative.match(pattern) for pattern in EXCLUDED_FILES
        ):
            files[relative.as_posix()] = path
    return dict(sorted(files.items()))


def training_texts() -> list[str]:
    """The text of every module that is not held out."""
    return [
        path.read_text(encoding="utf-8")
        for name, path in stdlib_files().items()
        if name not in HELD_OUT
    ]


def heldout_text() -> str:
    files = stdlib_files()
    return "\n".join(files[name].read_text(encoding="utf-8") for name in HELD_OUT)


def corpus_record(texts: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return {
        "text": f"standard library source of CPython {platform.python_version()}",
        "license": "PSF-2.0",
        "modules": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "sha256": digest.hexdigest(),
        "held_out_modules": list(HELD_OUT),
    }


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, whose id 0 separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    tokenizer.save_pretrained(target)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one stream of token ids, each but the last followed by the separator."""
    ids: list[int] = []
    for index, text in enumerate(texts):
        if index:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return torch.tensor(ids)


def random_windows(stream: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - WINDOW + 1, (count, 1), generator=generator)
    return stream[starts + torch.arange(WINDOW)]


# --- train ----------------------------------------------------------------------------------------


def make_model(settings: TrainSettings, end_of_text: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: LlamaForCausalLM, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays the linear layers only, not the embedding and the norms."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        linear = parameter.ndim == 2 and "embed" not in name
        (decayed if linear else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine from 1 to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy of tokens 2.. of each window, given the tokens before them."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def fit(model: LlamaForCausalLM, stream: Tensor, settings: TrainSettings) -> float:
    """Train in place; return the mean loss of the last 50 steps."""
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(1, settings.steps + 1):
        loss = next_token_loss(model, random_windows(stream, settings.batch, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"step {step:5}  loss {mean:.4f}  {time.monotonic() - start:6.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def unigram_perplexity(stream: Tensor, heldout: Tensor, vocab_size: int) -> float:
    """Held-out perplexity of the token frequencies of the training text, one added to each."""
    counts = torch.bincount(stream, minlength=vocab_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[heldout].mean().item())


def train(settings: TrainSettings, demo: Path) -> None:
    torch.manual_seed(settings.seed)
    texts = training_texts()
    heldout = heldout_text()
    tokenizer = make_tokenizer(texts, settings.vocab_size)
    stream = encode(tokenizer, texts)
    model = make_model(settings, tokenizer.eos_token_id)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens", flush=True)

    loss = fit(model, stream, settings)

    target = demo / "fp16"
    target.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, target)
    (demo / "heldout.txt").write_text(heldout, encoding="utf-8")
    shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", demo / "LICENSE-python.txt")
    unigram = unigram_perplexity(stream, encode(tokenizer, [heldout]), settings.vocab_size)
    update_provenance(
        demo,
        versions=versions("torch", "transformers", "tokenizers", "safetensors"),
        corpus=corpus_record(texts) | {"tokens": len(stream)},
        training=asdict(settings)
        | {
            "window": WINDOW,
            "threads": torch.get_num_threads(),
            "optimizer": "AdamW, linear warm-up, cosine to 0, float32, CPU",
            "tokens_seen": settings.steps * settings.batch * WINDOW,
            "parameters": parameters,
            "final_train_loss": round(loss, 4),
            "unigram_heldout_perplexity": round(unigram, 3),
        },
    )


# --- quantize -------------------------------------------------------------------------------------


def quantize(name: str, settings: QuantSettings, demo: Path) -> None:
    """Write ``demo/name`` with GPTQModel, calibrated on windows of the training text."""
    # GPTQModel asks for two workers, but on a machine of two cores makes only one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    texts = training_texts()
    recorded = read_provenance(demo)["corpus"]["sha256"]
    if corpus_record(texts)["sha256"] != recorded:
        raise SystemExit("this interpreter's standard library is not the one trained on")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "fp16")
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    windows = random_windows(encode(tokenizer, texts), settings.calibration_windows, generator)

    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.sym,
        desc_act=settings.desc_act,
        act_group_aware=False,
    )
    model = GPTQModel.load(str(demo / "fp16"), config, device="cpu", dtype=torch.float16)
    model.quantize([{"input_ids": row.tolist()} for row in windows], batch_size=8)
    target = demo / name
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        # The tokenizer is that of fp16/, and the logs of the run are of no use to a reader.
        shutil.copy(Path(scratch) / "model.safetensors", target / "model.safetensors")
        for file in ("config.json", "quantize_config.json"):
            content = json.loads((Path(scratch) / file).read_text(encoding="utf-8"))
            write_json(target / file, without_paths(content))
    # GPTQModel turns sampling on in this file; keep greedy generation the default.
    shutil.copy(demo / "fp16" / "generation_config.json", target / "generation_config.json")

    reordered = reordered_layers(target, settings.group_size)
    if bool(reordered) != settings.desc_act:
        raise SystemExit(f"{name}: {reordered} layers have a reordered g_idx")
    update_provenance(
        demo,
        versions=versions("gptqmodel", "torch", "transformers"),
        quantization={name: asdict(settings) | {"layers_with_reordered_g_idx": reordered}},
    )


def without_paths(content: Any) -> Any:
    """Drop the keys that say where something lay on the machine, at any depth."""
    if isinstance(content, dict):
        return {
            key: without_paths(value)
            for key, value in content.items()
            if key not in ("_name_or_path", "offload_to_disk_path")
        }
    return content


def reordered_layers(folder: Path, group_size: int) -> int:
    """How many layers have a g_idx other than the trivial one, row // group_size."""
    tensors = load_file(folder / "model.safetensors")
    return sum(
        not torch.equal(tensor.long(), torch.arange(len(tensor)) // group_size)
        for name, tensor in tensors.items()
        if name.endswith(".g_idx")
    )


# --- evaluate -------------------------------------------------------------------------------------


def unpack_nibbles(words: Tensor, dim: int) -> Tensor:
    """Unpack int32 words into eight 4-bit values each along ``dim``, lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    shape = [1] * (words.ndim + 1)
    shape[dim + 1] = 8
    return ((words.unsqueeze(dim + 1) >> shifts.view(shape)) & 15).flatten(dim, dim + 1)


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, zero_offset: int
) -> Tensor:
    """The float32 weight [out, in] of a 4-bit GPTQ layer: w = (q - z) * s.

    ``qweight`` [in/8, out] packs the values along in, ``qzeros`` [groups, out/8] the zero points
    along out; ``scales`` is [groups, out] and ``g_idx`` [in] gives the group of each input. Format
    v1 stores z - 1 (``zero_offset`` 1), v2 stores z (``zero_offset`` 0).
    """
    values = unpack_nibbles(qweight, 0)
    zeros = (unpack_nibbles(qzeros, 1) + zero_offset) & 15
    group = g_idx.long()
    return ((values - zeros[group]).float() * scales.float()[group]).T.contiguous()


def dequantized_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint in float32, with its quantised layers dequantised."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config", {})
    zero_offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    other_kinds = ("qzeros", "scales", "g_idx")
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qweight":
            qzeros, scales, g_idx = (tensors[f"{layer}.{part}"] for part in other_kinds)
            yield f"{layer}.weight", dequantize(tensor, qzeros, scales, g_idx, zero_offset)
        elif kind not in other_kinds:
            yield name, tensor.float()


def load_float32(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint, quantised or not, as a plain float32 transformers model."""
    config = LlamaConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, unexpected = model.load_state_dict(dict(dequantized_weights(folder)), strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"{folder.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, heldout: Tensor) -> float:
    """As the module's docstring defines it."""
    windows = heldout[: len(heldout) // WINDOW * WINDOW].view(-1, WINDOW)
    # Equal batches of one window each, so that the mean of means is the mean.
    return math.exp(sum(next_token_loss(model, row[None]).item() for row in windows) / len(windows))


@torch.inference_mode()
def continuation(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = encode(tokenizer, [prompt])[None]
    new = model.generate(ids, max_new_tokens=96, do_sample=False)
    return str(tokenizer.decode(new[0]))


def evaluate(demo: Path, record: bool, prompt: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "fp16")
    heldout = encode(tokenizer, [(demo / "heldout.txt").read_text(encoding="utf-8")])
    print(f"heldout.txt: {len(heldout):,} tokens, {len(heldout) // WINDOW} windows of {WINDOW}")
    results = {}
    for name in ("fp16", *QUANTIZED):
        if not (demo / name / "model.safetensors").exists():
            continue
        model = load_float32(demo / name)
        results[name] = round(perplexity(model, heldout), 4)
        print(f"{name:18} perplexity {results[name]:.4f}", flush=True)
        if prompt:
            print(continuation(model, tokenizer, prompt))
        del model
        gc.collect()
    if record:
        update_provenance(
            demo,
            evaluation={
                "heldout_tokens": len(heldout),
                "windows": len(heldout) // WINDOW,
                "window": WINDOW,
                "perplexity": results,
            },
            files=file_records(demo),
        )


# --- provenance -----------------------------------------------------------------------------------


def versions(*packages: str) -> dict[str, str]:
    installed = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | installed


def file_records(demo: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but PROVENANCE.json itself."""
    return {
        path.relative_to(demo).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(demo.rglob("*"))
        if path.is_file() and path.name != "PROVENANCE.json"
    }


def read_provenance(demo: Path) -> dict[str, Any]:
    path = demo / "PROVENANCE.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def update_provenance(demo: Path, **sections: dict[str, Any]) -> None:
    """Replace sections; ``versions`` and ``quantization`` are added to, as they grow by step."""
    content = read_provenance(demo)
    for section, value in sections.items():
        kept = content.get(section, {}) if section in ("versions", "quantization") else {}
        content[section] = kept | value
    write_json(demo / "PROVENANCE.json", content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder to write and to read")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train the model and save it in fp16")
    train_parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    quantize_parser = commands.add_parser("quantize", help="write the GPTQ checkpoints")
    quantize_parser.add_argument("names", nargs="*", default=list(QUANTIZED), metavar="NAME")
    evaluate_parser = commands.add_parser("evaluate", help="print held-out perplexities")
    evaluate_parser.add_argument("--record", action="store_true", help="into PROVENANCE.json")
    evaluate_parser.add_argument("--prompt", default="", help="also continue this text, greedily")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.command == "train":
        train(TrainSettings(steps=options.steps), options.demo)
    elif options.command == "quantize":
        for name in options.names:
            quantize(name, QUANTIZED[name], options.demo)
    else:
        evaluate(options.demo, options.record, options.prompt)


if __name__ == "__main__":
    main()
