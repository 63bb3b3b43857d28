"""Parts of a packed layer, for tensor parallelism: the tensors of some of its rows and columns.

They are exact, whatever the boundaries: blocks that a boundary cuts are unpacked and packed again,
and a group of columns that it cuts gives its scale to both sides. The format has no group that is
short at its start, so a part may get a smaller group size, whose groups repeat scales; or, where no
size of the format fits, up to 31 columns before its own (``lead``), to be multiplied by zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from marlin.formats.native import PackedShape
from marlin.formats.packed import GROUP_SIZES, group_count
from marlin.formats.sparse import QUAD

BLOCK = 64
SPARSE_COLUMNS = 128  # of a block of a 2:4 sparse weight


@dataclass(frozen=True)
class Part:
    """The output features ``rows`` and packed columns ``columns`` of a layer of ``whole``.

    Raises:
        ValueError: a range is empty or exceeds the layer, or cuts a sparse weight inside four
            columns.
    """

    whole: PackedShape
    rows: range
    columns: range

    def __post_init__(self) -> None:
        for name, part, size in (
            ("rows", self.rows, self.whole.out_features),
            ("columns", self.columns, self.whole.in_features),
        ):
            if part.step != 1 or not 0 <= part.start < part.stop <= size:
                raise ValueError(
                    f"{name}: got {part.start}..{part.stop}; a part must have at least one of the "
                    f"layer's {size}; choose other bounds, or fewer ranks"
                )
        if self.whole.sparse and (self.columns.start % QUAD or self.columns.stop % QUAD):
            raise ValueError(
                f"columns: got {self.columns.start}..{self.columns.stop} of a 2:4 sparse layer; "
                "its weights are of whole fours of input features; choose bounds that are "
                "multiples of 4"
            )

    @cached_property
    def _group(self) -> int:
        """Columns that share a scale in the whole layer."""
        k, size = self.whole.in_features, self.whole.group_size
        return k if group_count(k, size) == 1 else size

    @cached_property
    def _groups(self) -> range:
        """The groups of the whole layer that the part has columns of."""
        return range(self.columns.start // self._group, (self.columns.stop - 1) // self._group + 1)

    @cached_property
    def group_size(self) -> int:
        """The part's own: the largest that its first group fits; -1 if one group is all it has."""
        if len(self._groups) == 1:
            return -1
        offset = self._start % self._group
        return max(s for s in GROUP_SIZES if s <= self._group and offset % s == 0)

    @cached_property
    def lead(self) -> int:
        """How many columns that are not its own the part begins with."""
        if len(self._groups) == 1:
            return 0
        return self.columns.start % self._group % GROUP_SIZES[0]

    @property
    def shape(self) -> PackedShape:
        """That of the part, its lead included."""
        return PackedShape(
            self.lead + len(self.columns), len(self.rows), self.group_size, self.whole.sparse
        )

    @property
    def has_all_columns(self) -> bool:
        """Whether it is of output features only."""
        return len(self.columns) == self.whole.in_features

    @property
    def _block_columns(self) -> int:
        return SPARSE_COLUMNS if self.whole.sparse else BLOCK

    @property
    def _start(self) -> int:
        return self.columns.start - self.lead

    def window(self, leaf: str) -> tuple[slice, ...]:
        """What :meth:`trim` needs of the whole layer's tensor ``leaf``."""
        rows = slice(self.rows.start, self.rows.stop)
        if leaf in ("qweight", "places"):
            wide = self._block_columns
            return (
                slice(rows.start // BLOCK, -(-rows.stop // BLOCK)),
                slice(self._start // wide, -(-self.columns.stop // wide)),
            )
        if leaf in ("scales", "zeros"):
            return slice(self._groups.start, self._groups.stop), rows
        return (rows,) if leaf == "bias" else (slice(0, self.whole.in_features),)

    def trim(self, leaf: str, window: Tensor) -> Tensor:
        """The part's tensor, from what :meth:`window` says.

        A part of ``perm`` is the input features of its own columns, in their order.
        """
        if leaf in ("qweight", "places"):
            return window if self._has_whole_blocks else self._repack(leaf, window)
        if leaf in ("scales", "zeros") and self.group_size != -1:
            starts = torch.arange(self._start, self.columns.stop, self.group_size)
            return window[(starts // self._group - self._groups.start).to(window.device)]
        return window[self.columns.start : self.columns.stop] if leaf == "perm" else window

    def cut(self, leaf: str, tensor: Tensor) -> Tensor:
        """The part's tensor, in memory of its own, from the whole layer's."""
        window = tensor[self.window(leaf)]
        return self.trim(leaf, window.clone(memory_format=torch.contiguous_format))

    @property
    def _has_whole_blocks(self) -> bool:
        ends = (
            (self._start, self.columns.stop, self.whole.in_features, self._block_columns),
            (self.rows.start, self.rows.stop, self.whole.out_features, BLOCK),
        )
        return all(
            start % block == 0 and (stop % block == 0 or stop == size)
            for start, stop, size, block in ends
        )

    def _repack(self, leaf: str, window: Tensor) -> Tensor:
        n, k = BLOCK * window.size(0), self._block_columns * window.size(1)
        top, left = self.rows.start % BLOCK, self._start % self._block_columns
        rows = slice(top, top + len(self.rows))
        columns = slice(left, left + self.columns.stop - self._start)
        if leaf == "places":
            codes = window.new_zeros((*window.shape[:2], 512))
            _, mask = torch.ops.marlin.unpack_24(codes, window, n, k)
            mask = mask[rows, columns].contiguous()
            zeros = torch.zeros_like(mask, dtype=torch.uint8)
            places: Tensor = torch.ops.marlin.pack_24(zeros, mask)[1]
            return places
        if self.whole.sparse:  # half of the columns are stored, packed as a dense weight is
            k, columns = k // 2, slice(columns.start // 2, columns.stop // 2)
        q = torch.ops.marlin.unpack(window, n, k)[rows, columns]
        qweight: Tensor = torch.ops.marlin.pack(q.contiguous())
        return qweight
