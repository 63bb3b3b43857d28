"""What the packings of the original Marlin kernel and of Sparse-Marlin share.

Words are int32 ``[K/16, 2N]``; of Sparse-Marlin, K counts stored weights only. Row k // 16 has
those of 16 neighbouring input features, and word (c, col, t, j) of it, c = n // 64, the nibble
f = 4h + 2b + r of

    k = 16 row + 8 r + 2 t + h        (t, j: 0..3, col: 0..7, h, b, r: 0..1)

The two differ in which output feature of its 64 it is, of col, b and j. Scales are one group, or
groups of 128. Source: the ``Layer`` class of IST-DASLab/marlin; compressed_tensors, marlin_24.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.formats.packed import describe, label

ROWS = 64  # output features that the packing is in multiples of
DEPTH = 16  # input features of a row of words
GROUP = 128
COL, J, B = 2, 4, 6  # axes of the unpacked words
_CHUNK, _ROW, _R, _T, _H = 1, 0, 7, 3, 5


def nibbles(words: Tensor) -> Tensor:
    """Integers as nibbles, the lowest first: uint8 ``[*shape, 2 * bytes]``."""
    pairs = words.contiguous().view(torch.uint8)  # little-endian bytes
    return torch.stack([pairs & 15, pairs >> 4], -1).view(*words.shape, -1)


def unpack_tiles(words: Tensor, outputs: tuple[int, int, int]) -> Tensor:
    """The integers, uint8 ``[N, K]``; ``outputs``: the parts of n % 64, the slowest first."""
    rows, n = words.size(0), words.size(1) // 2
    grid = nibbles(words).view(rows, n // ROWS, 8, 4, 4, 2, 2, 2)
    return grid.permute(_CHUNK, *outputs, _ROW, _R, _T, _H).reshape(n, DEPTH * rows)


def scale_problems(
    names: tuple[str, str], scale: Tensor, words: Tensor, n: int, k: int, layer: str
) -> list[str]:
    """What is wrong with the shape of ``scale`` beside ``words``, both called so in ``names``."""
    scale_name, words_name = names
    groups = sorted({1, -(-k // GROUP)})
    if scale.dim() == 2 and scale.size(1) == n and scale.size(0) in groups:
        return []
    allowed = " or ".join(str([count, n]) for count in groups)
    return [
        f"{label(layer)}{scale_name}: got {describe(scale)}; {words_name} {describe(words)} has "
        f"in_features={k}, out_features={n}, so it must be {allowed}: one group, or groups of "
        "128; the tensors are not of one layer"
    ]


def device_problems(name: str, words: Tensor, others: dict[str, Tensor], layer: str) -> list[str]:
    """A refusal of each tensor that is not on the device of ``words``, which is called ``name``."""
    return [
        f"{label(layer)}{other}: got a tensor on {tensor.device}; {name} is on {words.device} and "
        f"all must be on one device; move it with {other}.to({str(words.device)!r})"
        for other, tensor in others.items()
        if tensor.device != words.device
    ]
