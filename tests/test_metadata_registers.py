"""Machine code for 2:4 sparse weights on Hopper: nothing writes a metadata register too early.

``wgmma.sp`` reads its metadata register while it runs, but ptxas takes it for read when the
instruction is issued, and may give it to another value before the wait. The source waits before it
loads metadata anew (csrc/cuda/sm90/step.cuh); whether ptxas keeps other values out of the registers
until then, only its output shows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import marlin
from marlin import _inspect

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([^;]*);")
DESTINATION = re.compile(r"(\S+) R(\d+)\b")
NO_DESTINATION = ("ST", "RED", "SYNCS", "BAR", "ATOM")
BRANCH = re.compile(r"BRA\b.*\b0x([0-9a-f]+)")


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    if triton and triton.submodule_search_locations:
        path = Path(triton.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        return str(path) if path.exists() else None
    return None


def written(instruction: str) -> range:
    """The registers that an instruction writes, as far as its first operand says."""
    match = DESTINATION.match(instruction)
    if not match or match[1].startswith(NO_DESTINATION):
        return range(0)
    wide = 4 if ".128" in match[1] else 2 if re.search(r"\.64|\.WIDE|CS2R", match[1]) else 1
    return range(int(match[2]), int(match[2]) + wide)


def functions(sass: Iterator[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """The name of every function, and its instructions with their addresses."""
    name, code = "", list[tuple[int, str]]()
    for line in sass:
        if "Function :" in line:
            if code:
                yield name, code
            name, code = line.split(":")[1].strip(), []
        elif match := INSTRUCTION.match(line):
            code.append((int(match[1], 16), match[2].strip()))
    if code:
        yield name, code


def early_writes(code: list[tuple[int, str]]) -> list[str]:
    """What writes the metadata of a sparse multiplication that has not been waited for.

    Along the code as it lies, and once more from the target of every branch back.
    """
    found = []

    def walk(begin: int, end: int, pending: set[int], follow: bool) -> None:
        for i in range(begin, end):
            address, instruction = code[i]
            if instruction.startswith("HGMMA.SP"):
                pending.add(int(re.findall(r"\bR(\d+)\b", instruction)[-1]))
            elif re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", instruction):
                pending.clear()
            elif pending.intersection(written(instruction)):
                found.append(f"{address:x}: {instruction}")
            elif follow and pending and (match := BRANCH.match(instruction)):
                target = int(match[1], 16)
                if target < address:
                    first = next(j for j, (at, _) in enumerate(code) if at >= target)
                    walk(first, i, set(pending), follow=False)

    walk(0, len(code), set(), follow=True)
    return found


LOAD = "LDS.64 R72, [R30+0x9000]"
MULTIPLY = "HGMMA.SP.64x16x32.F32 R32, R40, gdesc[UR12], RZ, !UPT, R73, 0x0, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        ([LOAD, MULTIPLY, WAIT, LOAD], 0),
        ([LOAD, MULTIPLY, LOAD, WAIT], 1),
        ([MULTIPLY, WAIT.replace("0x0", "0x3"), LOAD], 1),
        ([LOAD, WAIT, MULTIPLY, "BRA 0x0", WAIT], 1),
        ([WAIT, LOAD, MULTIPLY, "BRA 0x0", WAIT], 0),
    ],
)
def test_early_writes_are_found(lines: list[str], early: int) -> None:
    sass = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    ((_, code),) = functions(iter(["Function : f", *sass]))
    assert len(early_writes(code)) == early


def test_no_metadata_register_is_written_before_the_wait() -> None:
    if "90a" not in _inspect.build_info()["architectures"]:
        pytest.skip("this build has no code for Hopper")
    tool = cuobjdump()
    if not tool:
        pytest.skip("cuobjdump not found: it is in the CUDA toolkit, and in Triton's package")
    library = next(Path(marlin.__file__).parent.glob("_ops*.so"))
    run = subprocess.run(
        [tool, "--dump-sass", str(library)], capture_output=True, text=True, check=True
    )
    kernels, found = 0, []
    for name, code in functions(iter(run.stdout.splitlines())):
        if any(instruction.startswith("HGMMA.SP") for _, instruction in code):
            kernels += 1
            found += [f"{name}: {write}" for write in early_writes(code)]
    assert kernels > 20
    assert not found, "\n".join(found[:20])
