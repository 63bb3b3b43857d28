"""The demonstration runs to its end and its numbers make sense."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).with_name("demo.py")


def test_demo(device: str) -> None:
    pytest.importorskip("transformers")
    paths = [str(DEMO.parents[1]), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(DEMO), "--device", device, "--tokens", "8"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert run.returncode == 0, run.stderr
    number = r"([\d,.]+)"
    fp16 = re.search(rf"^ *fp16 +0 +{number} +{number} +{number}$", run.stdout, re.MULTILINE)
    assert fp16, run.stdout
    for name in ("gptq-g128", "gptq-g64-actorder"):
        found = re.search(
            rf"^ *{name} +21 +{number} +{number} of {number} +{number} +{number}$",
            run.stdout,
            re.MULTILINE,
        )
        assert found, run.stdout
        size, error, scale, perplexity = (float(v.replace(",", "")) for v in found.groups()[:4])
        assert size < 0.3 * float(fp16[1].replace(",", ""))
        assert error < 2e-3 * scale  # fp16 roundings along three layers
        assert perplexity < 1.02 * float(fp16[2])
    sparse = re.search(
        rf"^ *2:4-magnitude +21 +{number} +{number} of {number} +{number} +{number}$",
        run.stdout,
        re.MULTILINE,
    )
    assert sparse, run.stdout
    less, error, scale, perplexity = (float(v.replace(",", "")) for v in sparse.groups()[:4])
    assert less < 0.8 * size  # 3.13 bits for 4.13
    assert error < 2e-3 * scale
    assert perplexity > float(fp16[2])  # honest: dropping half of the weights by size hurts
    assert "calibration data comes next" in run.stdout
