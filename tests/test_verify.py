"""``marlin verify``: one changed bit is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
from checkpoints import (
    default_layers,
    gptq_config,
    make_layer,
    read_all,
    write_checkpoint,
)

from marlin.convert import convert
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.verify import verify


class TestVerify:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        layers = default_layers() | {
            "z.act": make_layer(64, 64, act_order=True, sym=False, bias=True)
        }
        write_checkpoint(tmp_path / "src", layers, config=gptq_config(sym=None))
        convert(tmp_path / "src", tmp_path / "dst", progress=False)
        return tmp_path / "dst", tmp_path / "src"

    @staticmethod
    def change(directory: Path, name: str, position: int = 0) -> None:
        """Flip one bit of one byte of a tensor in the file."""
        info = Checkpoint.open(directory).tensors[name]
        with info.path.open("r+b") as file:
            file.seek(info.start + position)
            byte = file.read(1)[0]
            file.seek(info.start + position)
            file.write(bytes([byte ^ 1]))

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("z.act.qweight", r"z\.act: weight row \d+, column \d+ is \d+, want \d+"),
            ("z.act.scales", r"z\.act: scales row 0 \(group\), column 0"),
            ("z.act.zeros", r"z\.act: zeros row 0 \(group\), column 0"),
            ("z.act.bias", r"z\.act: bias column 0"),
            ("z.act.perm", r"z\.act: perm is not a permutation"),
            ("model.embed.weight", r"model\.embed\.weight: byte 0"),
            ("model.layers.0.down.qweight", r"model\.layers\.0\.down: weight row"),
        ],
    )
    def test_one_bit_is_found(self, pair: tuple[Path, Path], name: str, says: str) -> None:
        dst, src = pair
        self.change(dst, name)
        report = verify(dst, src, progress=False)
        assert not report.equal
        (mismatch,) = report.mismatches
        import re

        assert re.search(says, mismatch), mismatch

    def test_weight_position_is_right(self, pair: tuple[Path, Path]) -> None:
        dst, src = pair
        tensors = read_all(dst)
        q = reference.unpack(tensors["model.layers.0.up.qweight"], 96, 64)
        q[70, 33] ^= 4
        info = Checkpoint.open(dst).tensors["model.layers.0.up.qweight"]
        with info.path.open("r+b") as file:
            file.seek(info.start)
            file.write(reference.pack(q).numpy().tobytes())
        (mismatch,) = verify(dst, src, progress=False).mismatches
        assert mismatch.startswith("model.layers.0.up: weight row 70, column 33 is ")

    def test_another_source(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "other", {"model.layers.0.up": make_layer(64, 96, seed=1)})
        report = verify(pair[0], tmp_path / "other", progress=False)
        assert any("not a quantized layer of the source" in text for text in report.mismatches)

    def test_swapped_arguments(self, pair: tuple[Path, Path]) -> None:
        """It is a comparison of two checkpoints: which was made from which does not matter."""
        dst, src = pair
        assert verify(src, dst, progress=False).equal
        self.change(src, "z.act.g_idx")
        assert not verify(src, dst, progress=False).equal

    def test_unquantized(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (pair[0] / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="not a quantized checkpoint"):
            verify(pair[0], pair[1], progress=False)
