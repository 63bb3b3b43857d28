"""What ``marlin.fuse`` did to a model, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from marlin._replace_report import SkippedLayer


@dataclass(frozen=True)
class FusedLayers:
    """Layers that are one GEMM now: their names, and (out_features of all, in_features)."""

    names: tuple[str, ...]
    shape: tuple[int, int]


@dataclass
class FuseReport:
    """What :func:`marlin.fuse` did; ``print(report)`` shows it as a table.

    ``skipped`` are packed layers that share an input with others, or may do so, and were not fused.
    """

    fused: list[FusedLayers] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings only: ready for ``json.dumps``."""
        return {
            "fused": [{"names": list(f.names), "shape": list(f.shape)} for f in self.fused],
            "skipped": [asdict(layer) for layer in self.skipped],
        }

    def __str__(self) -> str:
        rows = [("layers", "shape")]
        rows += [(_together(f.names), f"{f.shape[0]} x {f.shape[1]}") for f in self.fused]
        layers = sum(len(f.names) for f in self.fused)
        rows.append((f"fused {layers} layers into {len(self.fused)}", ""))
        left, right = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{row[0]:<{left}}  {row[1]:>{right}}" for row in rows]
        if self.skipped:
            lines.append(f"left as they were: {len(self.skipped)}")
            width = max(len(layer.name) for layer in self.skipped)
            lines += [f"  {layer.name:<{width}}  {layer.reason}" for layer in self.skipped]
        return "\n".join(line.rstrip() for line in lines)


def _together(names: tuple[str, ...]) -> str:
    """``"layers.0.mlp: gate_proj, up_proj"``."""
    parent = names[0].rpartition(".")[0]
    leaves = ", ".join(name.rpartition(".")[2] for name in names)
    return f"{parent}: {leaves}" if parent else leaves
