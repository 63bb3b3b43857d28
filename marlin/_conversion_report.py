"""What converting or exporting a checkpoint did, or would do, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One converted or exported layer.

    ``group_size`` -1 is one group; ``zeros`` and ``act_order`` say whether it keeps zero points and
    an order of its features; ``dtype`` is that of its scales; sizes are bytes. ``sparse``: it is
    stored 2:4 sparse; ``dense_reason``: why it is not though it was asked for, else empty.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int
    zeros: bool
    act_order: bool
    bias: bool
    dtype: str
    bytes_before: int
    bytes_after: int
    sparse: bool = False
    dense_reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion or an export did or, after a dry run, would do. Sizes are bytes of tensors.

    ``source_format``: the ``quant_method`` of the source; ``destination_format``: ``"marlin"`` or
    what was exported.
    """

    source: str
    source_format: str
    destination: str
    destination_format: str
    dry_run: bool
    layers: list[LayerReport]
    other_tensors: int
    bytes_before: int
    bytes_after: int
    shards: list[str]
    copied_files: list[str]
    skipped_files: list[str]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)
