"""What ``marlin.replace_linear`` did to a model, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that was replaced: its name, (out_features, in_features), and its bytes.

    ``dtype_before`` is that of its weight, ``dtype_after`` that of the activations it takes now.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    dtype_before: str
    dtype_after: str


@dataclass(frozen=True)
class SkippedLayer:
    """A linear layer that was left as it was, and why."""

    name: str
    reason: str


@dataclass
class ReplaceReport:
    """What :func:`replace_linear` did; ``print(report)`` shows it as a table."""

    replaced: list[ReplacedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of weight and bias of the replaced layers, before."""
        return sum(layer.bytes_before for layer in self.replaced)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the replaced layers, after."""
        return sum(layer.bytes_after for layer in self.replaced)

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings only: ready for ``json.dumps``."""
        return {
            "replaced": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.replaced],
            "skipped": [asdict(layer) for layer in self.skipped],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        rows = [("layer", "shape", "before", "after")]
        rows += [
            (r.name, f"{r.shape[0]} x {r.shape[1]}", _size(r.bytes_before), _size(r.bytes_after))
            for r in self.replaced
        ]
        total = f"replaced {len(self.replaced)}"
        rows.append((total, "", _size(self.bytes_before), _size(self.bytes_after)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        recast = sorted({r.dtype_after for r in self.replaced if r.dtype_after != r.dtype_before})
        if recast:
            lines.append(
                f"these take {' and '.join(recast)} activations now: cast the rest of the model, "
                f"too, with model.to(torch.{recast[0]})"
            )
        if self.skipped:
            lines.append(f"left as they were: {len(self.skipped)}")
            width = max(len(layer.name) for layer in self.skipped)
            lines += [f"  {layer.name:<{width}}  {layer.reason}" for layer in self.skipped]
        return "\n".join(line.rstrip() for line in lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
