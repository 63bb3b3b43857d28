"""Times calls as a model makes them: inside a CUDA graph, with weights that are not in cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Distinct weights add up to more than five times the L2 cache of an H200 (60 MB), so that by the
# time a weight's turn comes again nothing of it is left.
COLD_BYTES = 320e6
# A graph of less walks several times: a replay starts some microseconds late.
GRAPH_US = 1000.0


def copies_for(bytes_each: int) -> int:
    """How many distinct copies of a weight make the walk over them cold."""
    return max(2, -(-int(COLD_BYTES) // max(1, bytes_each)))


@dataclass
class Times:
    """Microseconds per call.

    ``us`` is the median of 7 replays of the graph, one after the other, each timed by itself, after
    one rest of the GPU. What is compared makes as many calls: fewer, as fp16 weights need to be
    cold, would leave the GPU cooler and faster.
    ``sustained_us`` is that of 7 windows of 10 ms after 30 ms of them: large shapes then draw all
    the power that the GPU may have, and its clocks fall.
    """

    us: float
    sustained_us: float | None = None


class Walk:
    """A CUDA graph of calls, each on weights of its own."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compile, load modules, fill caches of handles
                call()
        torch.cuda.synchronize()
        self.calls = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in calls:
                call()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def us(self, replays: int = 1) -> float:
        """Microseconds per call over so many replays."""
        self.begin.record()
        for _ in range(replays):
            self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return 1e3 * self.begin.elapsed_time(self.end) / replays / self.calls


def measure(
    calls: Sequence[Callable[[], object]], *, sustained: bool = True, rest_s: float = 0.05
) -> Times:
    """Times a walk over ``calls``."""
    walk = Walk(calls)
    walk.us()
    walks = math.ceil(GRAPH_US / (walk.us() * walk.calls))
    if walks > 1:
        walk = Walk([*calls] * walks)
        walk.us()
    time.sleep(rest_s)  # so that a shape does not pay for what the one before has heated
    walk.us()  # and the clocks are up again
    us = statistics.median(walk.us() for _ in range(7))
    if not sustained:
        return Times(us)
    replays = max(1, round(10e3 / (us * walk.calls)))
    for _ in range(3):
        walk.us(replays)
    return Times(us, statistics.median(walk.us(replays) for _ in range(7)))
