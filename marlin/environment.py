"""What a bug report needs to know about a machine; what cannot be found out is said so."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch


def _or_reason(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:  # a report about a broken installation must not break on it
        return f"not available ({type(error).__name__}: {error})"


def _driver() -> str:
    text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    return text.splitlines()[0].removeprefix("NVRM version:").strip()


def _build() -> dict[str, Any]:
    return dict(import_module("marlin._inspect").build_info())


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "sms": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def environment() -> dict[str, Any]:
    """Versions of the package, its build, torch, CUDA, driver, Python and system; the GPUs."""
    return {
        "marlin": _or_reason(lambda: metadata.version("marlin")),
        "build": _or_reason(_build),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none (a CPU build)",
        "driver": _or_reason(_driver),
        "gpus": _or_reason(_gpus),
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
    }
