"""What a result must say of the machine and the code that gave it."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

METHOD = (
    "time per call inside one CUDA graph that walks over at least 320 MB of distinct weights (cold "
    "L2), several times where that takes less than 1 ms; random weights and activations, "
    "static_weights=True, CUDA events; us: median of 7 replays of the graph, each timed by itself, "
    "one after the other after one rest; sustained_us: median of 7 windows of 10 ms of replays "
    "after 30 ms; floor: the time of an H200 (benchmarks/shapes.py); cuBLAS fp16 "
    "(torch.nn.functional.linear) and peers by the same method in the same process, over as many "
    "calls"
)


def commit() -> str:
    """The checkout's commit, with ``+`` where tracked files differ from it."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../marlin")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver_version() -> str:
    """The version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def describe(commit_name: str | None = None, method: str = METHOD) -> dict[str, str]:
    """The ``meta`` of a results file."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "commit": commit_name or commit(),
        "date": datetime.date.today().isoformat(),
        "method": method,
    }
