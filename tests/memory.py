"""How much memory a call needs, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import re, sys
import marlin, torch

def peak():  # ru_maxrss would be the parent's: a process begins as a copy of it
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

source, target = sys.argv[1:]
# The ops' own working memory, for layers of 2048 x 2048, does not count.
torch.ops.marlin.repack_gptq(torch.zeros(256, 2048, dtype=torch.int32))
torch.ops.marlin.repack_awq(torch.zeros(2048, 256, dtype=torch.int32))
qweight = torch.ops.marlin.pack(torch.zeros(2048, 2048, dtype=torch.uint8))
torch.ops.marlin.unpack(qweight, 2048, 2048)
del qweight
PREPARATION
before = peak()
CALL
print(peak() - before)
"""


def grown(call: str, source: Path, target: Path, preparation: str = "") -> float:
    """MiB by which ``call`` raises the host's peak; its code calls the paths ``source`` and
    ``target``. ``preparation`` is code that runs before, and does not count.
    """
    code = CODE.replace("PREPARATION", preparation).replace("CALL", call)
    command = [sys.executable, "-c", code, str(source), str(target)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=True, text=True, timeout=300
    )
    return int(done.stdout) / 1024
