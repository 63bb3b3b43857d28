"""Notices whether the tensors of a layer were replaced or written since the last look."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

Seen = list[tuple[int, int]]


class WeightWatch:
    """Remembers the addresses and versions of tensors; a copy or a pickle remembers nothing.

    No references: strong ones would keep offloaded memory, and torch refuses to swap a tensor that
    has weak ones (``torch.__future__.set_swap_module_params_on_conversion``).
    """

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: Seen = []

    def forget(self) -> None:
        """The next look finds everything changed: for writes known to leave an equal address."""
        self._seen = []

    def unchanged(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether ``tensors`` are those of the last call, unwritten since. Costs about 1 us.

        Writes that leave no trace in the version are not seen: those through ``tensor.data``, and
        by code that is not PyTorch's. Tensors made in inference mode have no version: never True.
        """
        seen = self._seen  # once: another thread may be here, too
        try:
            now: Seen = [(t.data_ptr(), t._version) for t in tensors if t is not None]
        except RuntimeError:  # no version (inference mode), or no address (a traced tensor)
            now = []
        self._seen = now
        return now == seen and bool(now)

    def __reduce__(self) -> tuple[type[WeightWatch], tuple[()]]:
        return WeightWatch, ()
