"""Ways to damage a checkpoint on disk, as functions of its folder; and what must come of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import snapshot, write_tensors
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from marlin.convert import convert
from marlin.formats.checkpoint import CheckpointError
from marlin.verify import verify

Damage = Callable[[Path], None]


def weights(root: Path) -> Path:
    return root / "model.safetensors"


def truncate(size: int) -> Damage:
    """Keep ``size`` bytes, or all but the last ``-size``."""

    def damage(root: Path) -> None:
        data = weights(root).read_bytes()
        weights(root).write_bytes(data[:size])

    return damage


def patch(position: int, data: bytes) -> Damage:
    def damage(root: Path) -> None:
        old = weights(root).read_bytes()
        weights(root).write_bytes(old[:position] + data + old[position + len(data) :])

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Rewrite the JSON header; ``change`` edits it or returns its new text."""

    def damage(root: Path) -> None:
        data = weights(root).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        text = change(entries)
        text = text if isinstance(text, bytes) else json.dumps(entries).encode()
        weights(root).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any], shards: int = 1) -> Damage:
    def damage(root: Path) -> None:
        found = load_file(weights(root))
        change(found)
        weights(root).unlink()
        write_tensors(root, {name: t.clone().contiguous() for name, t in found.items()}, shards)

    return damage


def put(name: str, make: Callable[[Tensor], Tensor]) -> Damage:
    return tensors(lambda found: found.update({name: make(found[name])}))


def poke(name: str, at: tuple[int, ...], value: float) -> Damage:
    return tensors(lambda found: found[name].__setitem__(at, value))


def text(file: str, content: str | bytes) -> Damage:
    def damage(root: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (root / file).write_bytes(data)

    return damage


def remove(file: str) -> Damage:
    return lambda root: (root / file).unlink()


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Damage:
    """Split the checkpoint in three, let ``change`` edit the folder and the weight map."""

    def damage(root: Path) -> None:
        tensors(lambda found: None, 3)(root)
        path = root / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(root, index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def several(*damages: Damage) -> Damage:
    def damage(root: Path) -> None:
        for each in damages:
            each(root)

    return damage


def assert_refused(
    tmp_path: Path,
    valid: Path,
    damage: Damage,
    reason: str,
    run: Callable[..., object] = convert,
) -> None:
    """A damaged copy of ``valid`` is refused for ``reason``, a dry run says the same, and nothing
    is written. ``run``: ``convert`` or ``export``."""
    source = tmp_path / "src"
    shutil.copytree(valid, source)
    damage(source)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        run(source, tmp_path / "dst", progress=False)
    assert re.search(reason, str(caught.value), re.DOTALL), str(caught.value)
    assert len(str(caught.value)) < 4000
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    with pytest.raises(CheckpointError, match=re.escape(str(caught.value))):
        run(source, tmp_path / "dst", progress=False, dry_run=True)


def change_bytes(path: Path, edits: Iterable[tuple[float, int]]) -> None:
    """Flip bits of a file: each edit is a place, as a share of the file, and the bits."""
    data = bytearray(path.read_bytes())
    for where, change in edits:
        data[int(where * (len(data) - 1))] ^= change
    path.write_bytes(data)


def assert_exact_or_refused(root: Path, run: Callable[..., object] = convert) -> None:
    """``src`` in a folder of its own is refused, or converted to what it holds; and unchanged.

    ``run``: ``convert`` or ``export``.
    """
    before = snapshot(root / "src")
    try:
        run(root / "src", root / "dst", progress=False)
    except CheckpointError:
        assert [path.name for path in root.iterdir()] == ["src"]
    else:
        assert verify(root / "dst", root / "src", progress=False).equal
    assert snapshot(root / "src") == before


# What hypothesis gives to test_changed_bytes: the arguments of assert_changes_are_noticed.
CHANGES = {
    "file": st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]),
    "edits": st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1),
}


def assert_changes_are_noticed(
    root: Path,
    valid: Path,
    file: str,
    edits: Iterable[tuple[float, int]],
    run: Callable[..., object] = convert,
) -> None:
    """A copy of ``valid`` in ``root``, with changed bytes, is refused, or converted exactly."""
    shutil.copytree(valid, root / "src")
    change_bytes(root / "src" / file, edits)
    assert_exact_or_refused(root, run)
    shutil.rmtree(root)
