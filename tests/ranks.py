"""Processes of one torch.distributed group, for tests of tensor parallelism."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # for which the others wait for a rank that has failed


def _work(rank: int, world_size: int, device: str, file: Path, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, "", function(device, *arguments)))
        except Exception:
            results.put((rank, traceback.format_exc(), None))
    dist.destroy_process_group()


class Ranks:
    """A group of processes that wait for functions to call; all run the same one."""

    def __init__(self, world_size: int, device: str, file: Path) -> None:
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_work,
                args=(rank, world_size, device, file, tasks, self.results),
                daemon=True,
            )
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def __len__(self) -> int:
        return len(self.processes)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(device, *arguments)`` returns on each rank; raises what it raised."""
        for tasks in self.tasks:
            tasks.put((function, arguments))
        found: dict[int, tuple[str, Any]] = {}
        while len(found) < len(self):
            try:
                rank, error, value = self.results.get(timeout=2 * SECONDS)
            except Empty:
                raise AssertionError(f"{len(found)} of {len(self)} ranks have answered") from None
            found[rank] = error, value
        errors = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(found.items()) if error]
        assert not errors, "\n".join(errors)
        return [found[rank][1] for rank in range(len(self))]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(10)
            process.kill()
