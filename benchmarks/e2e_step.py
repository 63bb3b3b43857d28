"""One step of a model, timed: a CUDA graph, and what must come of it."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.e2e_check import largest_error
from benchmarks.e2e_model import PLAIN, Decoder, Pieces, Sizes
from benchmarks.e2e_weights import VARIANTS

# Beside weights and cache: activations, workspaces, the CUDA context, what fragments. A model that
# leaves no room for these could not serve anything.
SPARE_BYTES = 12 << 30


class Point(NamedTuple):
    """A step: so many sequences, of so many tokens with those that the step reads."""

    phase: str  # decode or prefill
    batch: int
    tokens: int

    @property
    def new_tokens(self) -> int:
        """Tokens of a sequence that the step reads."""
        return self.tokens if self.phase == "prefill" else 1


class Measured(NamedTuple):
    """What a point gave; ``peak_bytes`` is None on a CPU."""

    ms: float
    sustained_ms: float | None
    peak_bytes: int | None
    error: float


class Step:
    """A model's step at a point, over a cache of its own, which the step fills to the end."""

    def __init__(self, model: Decoder, point: Point) -> None:
        new, device = point.new_tokens, model.device
        self.model = model
        self.tokens = torch.randint(model.sizes.vocab, (point.batch, new), device=device)
        self.positions = torch.arange(point.tokens - new, point.tokens, device=device)
        self.cache = model.new_cache(point.batch, point.tokens)

    def __call__(self, pieces: Pieces) -> None:
        self.logits = self.model(self.tokens, self.positions, self.cache, pieces)
        self.next_tokens = pieces.choose(self.logits)

    def take_result(self) -> list[Tensor]:
        """The logits, and the last keys and values of every layer, which it wipes: a step that does
        not write them again is found out."""
        last = torch.stack([kv[:, -1] for kv in self.cache])
        for kv in self.cache:
            kv[:, -1].zero_()
        return [self.logits, last]


def time_on_cpu(call: Callable[[], object]) -> timing.Times:
    """The median of a few calls."""
    us = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        us.append(1e6 * (time.perf_counter() - begin))
    return timing.Times(statistics.median(us))


def measure(model: Decoder, point: Point, pieces: Pieces) -> Measured:
    """Times a step, and compares what its CUDA graph computes with what it should."""
    step = Step(model, point)
    step(PLAIN)
    wanted = [tensor.cpu() for tensor in step.take_result()]  # out of the peak
    call = partial(step, pieces)
    call()  # compiles, tunes, and shows the layers that nothing has written their weights
    peak_bytes = None
    if model.device == "cpu":
        times = time_on_cpu(call)
    else:
        torch._C._cuda_clearCublasWorkspaces()  # else one stays for every stream there was
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = timing.measure([call], sustained=point.phase == "decode")
        peak_bytes = torch.cuda.max_memory_allocated()
    error = largest_error(step.take_result(), wanted)
    sustained_ms = None if times.sustained_us is None else times.sustained_us / 1e3
    return Measured(times.us / 1e3, sustained_ms, peak_bytes, error)


def fits(sizes: Sizes, variant: str, point: Point) -> bool:
    """Whether the device has room for a model and the cache of a point."""
    if not torch.cuda.is_available():
        return True
    needed = sizes.weight_bytes(VARIANTS[variant].bits)
    needed += sizes.cache_bytes(point.batch, point.tokens) + SPARE_BYTES
    return needed <= torch.cuda.get_device_properties().total_memory


def measure_model(
    sizes: Sizes, variant: str, points: Sequence[Point], pieces: Pieces, device: str
) -> Iterator[tuple[Point, Measured | None]]:
    """Builds a model and measures its points; None for those that the device has no room for."""
    fitting = [point for point in points if fits(sizes, variant, point)]
    if fitting:
        longest = max(point.tokens for point in fitting)
        model = Decoder(sizes, VARIANTS[variant].make, device, longest)
    for point in points:
        measured = None
        if point in fitting:
            with contextlib.suppress(torch.OutOfMemoryError):
                measured = measure(model, point, pieces)
            release()
        yield point, measured


def release() -> None:
    """Gives the memory of what is gone back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
