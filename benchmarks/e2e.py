"""Times whole models of random weights, decoding and reading a prompt: fp16 beside 4-bit.

A decode step reads one token per sequence, writes its keys and values as the last of a full cache,
and ends with the greedy choice of the next token. A prefill reads a prompt into an empty cache and
ends with the choice of its first token. Either is one CUDA graph. All but the linear layers is the
same for every variant; of what lies between products there are kinds (``--pieces``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import meta
from benchmarks.arguments import positive, positives
from benchmarks.e2e_check import BOUND, error_of_tiny_model
from benchmarks.e2e_model import MODELS, PLAIN, Pieces, Sizes, compiled_pieces
from benchmarks.e2e_step import Measured, Point, measure_model, release
from benchmarks.e2e_weights import GROUP_SIZE, VARIANTS

BASELINE = "fp16"
STEP_BOUND = 0.05  # roundings alone, which differ in compiled code, grow with the layers
METHOD = (
    f"random weights, distinct in every layer, 4-bit ones in groups of {GROUP_SIZE}; in every "
    "variant embeddings and the projection to the vocabulary are fp16, queries, keys and values "
    "are one linear layer, gate and up another; fp16 is torch.nn.functional.linear (cuBLAS); "
    "attention is over a static cache, which decode fills by its last token: of a prompt torch's "
    "by cuDNN, {pieces} in every variant; a step is one "
    "CUDA graph and ends with the greedy choice of the next token; ms: median of 7 replays, each "
    "timed by itself, one after the other after one rest; sustained_ms, of decode: median of 7 "
    "windows of 10 ms of replays (one replay where it takes longer) after 3; ms of prefill is the "
    "time to the first token; peak_bytes: the most memory that torch had allocated while the step "
    "was captured and replayed: weights, the cache of that batch, activations, workspaces; error: "
    "of the graph's logits, and of the keys and values that the step writes, against the same step "
    "without graph and with norms and the like as they are, relative"
)

# What lies between matrix products.
PIECES = {
    "early": "of decode, as norms, rotary positions and SwiGLU, a Triton kernel that lets the next "
    "kernel start early (benchmarks/e2e_attention.py, e2e_pieces.py); the choice is compiled by "
    "torch.compile,",
    "compiled": "of decode as well; norms, rotary positions, SwiGLU and the choice are compiled by "
    "torch.compile,",
    "plain": "of decode as well; norms, rotary positions, SwiGLU and the choice are as they are",
}


def starts_early() -> bool:
    """Whether the GPU, if there is one, knows programmatic dependent launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def make_pieces(kind: str) -> Pieces:
    """Those of a kind. What is compiled is so afresh: a model's sizes are constants."""
    if kind == "early":
        from benchmarks.e2e_pieces import early_pieces  # Triton comes with torch for CUDA only

        return early_pieces()
    return compiled_pieces() if kind == "compiled" else PLAIN


@dataclass
class Row:
    """A measured point.

    ``tokens``, of each sequence: the context in decode, the prompt in prefill. ``tokens_per_s`` of
    all sequences: generated in decode, read in prefill. ``speedup`` and ``memory``: speed and
    ``peak_bytes`` over those of fp16, None where it was not measured. ``layers``: fewer than the
    model's in a partial result.
    """

    model: str
    variant: str
    phase: str
    batch: int
    tokens: int
    layers: int
    ms: float
    sustained_ms: float | None
    tokens_per_s: float
    speedup: float | None
    peak_bytes: int | None
    memory: float | None
    error: float


def make_row(
    model: str, variant: str, layers: int, point: Point, measured: Measured, rows: list[Row]
) -> Row:
    """The row of a point; ``rows`` are those before it, fp16's among them."""
    points = {(row.model, row.variant, row.phase, row.batch): row for row in rows}
    before = points.get((model, BASELINE, point.phase, point.batch))
    baseline = measured if variant == BASELINE else before
    speedup = memory = None
    if baseline is not None:
        speedup = round(baseline.ms / measured.ms, 3)
        if baseline.peak_bytes and measured.peak_bytes:
            memory = round(measured.peak_bytes / baseline.peak_bytes, 4)
    sustained_ms = None if measured.sustained_ms is None else round(measured.sustained_ms, 4)
    return Row(
        model, variant, *point, layers, round(measured.ms, 4), sustained_ms,
        round(1e3 * point.batch * point.new_tokens / measured.ms, 1),
        speedup, measured.peak_bytes, memory, round(measured.error, 5),
    )  # fmt: skip


HEADER = (
    f"{'model':>12} {'variant':>9} {'phase':>7} {'batch':>5} {'tokens':>6} {'ms':>9} "
    f"{'sustained':>9} {'tokens/s':>9} {'speedup':>7} {'peak GB':>7} {'memory':>6} {'error':>7}"
)


def show(row: Row) -> None:
    """Prints a line of the table."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    peak_gb = None if row.peak_bytes is None else row.peak_bytes / 1e9
    print(
        f"{row.model:>12} {row.variant:>9} {row.phase:>7} {row.batch:>5} {row.tokens:>6} "
        f"{row.ms:9.3f} {text(row.sustained_ms, '.3f'):>9} {row.tokens_per_s:9.1f} "
        f"{text(row.speedup, '.2f'):>7} {text(peak_gb, '.2f'):>7} {text(row.memory, '.3f'):>6} "
        f"{row.error:7.4f}",
        flush=True,
    )


def within(what: str, error: float, bound: float) -> bool:
    """Whether an error is small enough; says so if it is not (or not a number)."""
    good = error <= bound
    if not good:
        print(f"WRONG: {what}: relative error {error:.4g}, more than {bound}", flush=True)
    return good


def sizes_to_measure(model: str, args: argparse.Namespace) -> Sizes:
    """The sizes of a model, or of what the options leave of it."""
    sizes = MODELS[model].tiny() if args.tiny else MODELS[model]
    return replace(sizes, layers=min(args.layers or sizes.layers, sizes.layers))


def measure(args: argparse.Namespace, save: Callable[[list[Row]], None]) -> tuple[list[Row], bool]:
    """Measures every point, printing a line for each; the rows, and whether all is right.

    ``save`` gets the rows there are after every variant.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = [Point("decode", batch, args.context) for batch in args.batch]
    points.append(Point("prefill", 1, args.prompt))
    rows: list[Row] = []
    right = True
    print(HEADER)
    for model in args.model or MODELS:
        sizes = sizes_to_measure(model, args)
        pieces = make_pieces(args.pieces)
        for variant in [name for name in VARIANTS if name in (args.variant or VARIANTS)]:
            error = error_of_tiny_model(sizes, variant, device)
            if not within(f"{model}, {variant}, a tiny model's logits", error, BOUND):
                right = False
                continue
            for point, measured in measure_model(sizes, variant, points, pieces, device):
                what = f"{model}, {variant}, {point.phase}, batch {point.batch}"
                if measured is None:
                    print(f"{what}: not measured, the GPU has too little memory", flush=True)
                    continue
                rows.append(make_row(model, variant, sizes.layers, point, measured, rows))
                show(rows[-1])
                right &= within(what, measured.error, STEP_BOUND)
            release()
            save(rows)
    return rows, right


def partial_because(args: argparse.Namespace) -> str:
    """Why the results do not say how fast the models are; empty where they do."""
    if args.tiny:
        return "tiny models"
    if args.layers is not None and any(args.layers < sizes.layers for sizes in MODELS.values()):
        return f"{args.layers} layers at most"
    return ""


def write(args: argparse.Namespace, rows: list[Row], partial: str) -> None:
    """Writes the JSON if asked to; ``partial`` says why it is not the whole result."""
    if not args.json:
        return
    about = meta.describe(args.commit, METHOD.format(pieces=PIECES[args.pieces]))
    if partial:
        about["partial"] = partial
    result = {"meta": about, "rows": [asdict(row) for row in rows]}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.json.with_name(args.json.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(args.json)  # a run that is killed leaves the last whole file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks e2e``."""
    parser.add_argument("--model", action="append", choices=MODELS, help="may repeat")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may repeat")
    parser.add_argument(
        "--batch", type=positives, default=[1, 4, 16, 32, 64, 128], help="of decode, e.g. 1,16"
    )
    parser.add_argument(
        "--context", type=positive, default=512, help="tokens that decode attends to (512)"
    )
    parser.add_argument("--prompt", type=positive, default=2048, help="tokens of prefill (2048)")
    parser.add_argument(
        "--layers", type=positive, help="only so many, for a quick try: the result is partial"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, on a CPU too: the result is partial"
    )
    parser.add_argument(
        "--pieces",
        choices=PIECES,
        help="norms, attention and the like: kernels that let the next one start early (the "
        "default where the GPU can do so), by torch.compile (elsewhere), or as they are",
    )
    parser.add_argument("--commit", help="what to record, where the checkout has no git history")
    parser.add_argument("--json", type=Path, help="where to write the results")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures, prints, and writes the JSON if asked to, after every variant."""
    if args.pieces == "early" and not starts_early():
        print("benchmarks e2e: --pieces early needs a GPU of compute capability 9.0 or later")
        return 2
    args.pieces = args.pieces or ("early" if starts_early() else "compiled")
    partial = partial_because(args)
    if partial:
        print(f"partial results: {partial}")
    # Of decode, where it is torch's: on an H100 with 512 tokens, batch 1 and 64, cuDNN takes 8.7
    # and 49.6 us, flash 9.6 and 60.5.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        rows, right = measure(args, lambda some: write(args, some, partial or "unfinished"))
    write(args, rows, partial)
    return 0 if right else 1
