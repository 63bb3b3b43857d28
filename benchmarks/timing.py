"""Times calls as a model makes them: inside a CUDA graph, with weights that are not in cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

# Distinct weights add up to more than five times the L2 cache of an H200 (60 MB), so that by the
# time a weight's turn comes again nothing of it is left.
COLD_BYTES = 320e6


def copies_for(bytes_each: int) -> int:
    """How many distinct copies of a weight make the walk over them cold."""
    return max(2, -(-int(COLD_BYTES) // max(1, bytes_each)))


def time_us(
    calls: Sequence[Callable[[], object]], *, window_ms: float = 10.0, repeats: int = 7
) -> float:
    """Microseconds per call: median over ``repeats`` windows of replays of a graph of ``calls``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compile, load modules, fill caches of handles
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def window(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / replays

    replays = max(1, round(window_ms / max(window(1), 1e-3)))
    for _ in range(3):  # until clocks have settled; the first point of a run was 15% slow without
        window(replays)
    return 1e3 * statistics.median(window(replays) for _ in range(repeats)) / len(calls)
