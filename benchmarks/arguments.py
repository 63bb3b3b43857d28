"""Types of command-line arguments: what is refused is told the rule."""

from __future__ import annotations

import argparse
import re


def positive(text: str) -> int:
    """A positive integer."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a positive integer")
    return value


def positives(text: str) -> list[int]:
    """Positive integers between commas."""
    return [positive(part) for part in text.split(",")]


def layer(text: str) -> tuple[int, int]:
    """The (N, K) of a layer, as in ``4096x14336``."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be NxK, as 4096x14336")
    return int(match[1]), int(match[2])
