"""Shared fixtures. Tests that take `device` run on the CPU and, marked `gpu`, on a CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference.py, operands.py, checkpoints.py

from ranks import Ranks

import marlin  # noqa: F401 - loads the ops
from marlin import _inspect

if "PYTEST_XDIST_WORKER" in os.environ:  # with -n: else every process takes all the cores
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        wanted = 2 if item.get_closest_marker("multi_gpu") else 1
        if item.get_closest_marker("gpu") and devices < wanted:
            reason = f"needs {wanted} CUDA device(s), found {devices}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def planner() -> Iterator[None]:
    """Leaves the choice of kernels to the planner again after a test that has forced some."""
    yield
    _inspect.force_plan()


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", 2),
        ("cpu", 3),
        pytest.param(("cuda", 2), marks=[pytest.mark.gpu, pytest.mark.multi_gpu]),
    ],
    ids=["gloo2", "gloo3", "nccl2"],
)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranks]:
    """Processes of a group, on CPUs and, marked ``gpu``, a GPU each."""
    device, world_size = request.param
    made = Ranks(world_size, device, tmp_path_factory.mktemp("ranks") / "rendezvous")
    yield made
    made.close()
