"""Notices whether the tensors of a layer were replaced or written since the last look."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor


class WeightWatch:
    """Remembers tensors by weak reference and version; a copy or a pickle remembers nothing.

    A weak reference, since an id is soon reused and a strong one would keep offloaded memory.
    """

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: tuple[tuple[Callable[[], Tensor | None], int], ...] = ()

    def unchanged(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether ``tensors`` are those of the last call, unwritten since. Costs 1 to 2 us.

        Writes that leave no trace in the version are not seen: those through ``tensor.data``, and
        by code that is not PyTorch's. Tensors made in inference mode have no version: never True.
        """
        for tensor, (reference, version) in zip(tensors, self._seen, strict=False):
            if tensor is None:
                if reference is not _nothing:  # a dead reference is None, too
                    break
            elif reference() is not tensor or tensor._version != version:
                break
        else:
            if self._seen:
                return True
        self._seen = _snapshot(tensors)
        return False

    def __reduce__(self) -> tuple[type[WeightWatch], tuple[()]]:
        return WeightWatch, ()


def _snapshot(
    tensors: Iterable[Tensor | None],
) -> tuple[tuple[Callable[[], Tensor | None], int], ...]:
    taken: list[tuple[Callable[[], Tensor | None], int]] = []
    for tensor in tensors:
        if tensor is None:
            taken.append((_nothing, 0))
        elif tensor.is_inference():
            return ()
        else:
            taken.append((weakref.ref(tensor), tensor._version))
    return tuple(taken)


def _nothing() -> None:
    """Stands for the reference to an absent tensor."""
