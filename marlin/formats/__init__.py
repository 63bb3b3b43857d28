"""Checkpoint formats: one module each, with its configuration and its pure tensor functions.

Those of which whole checkpoints are converted have a ``_source`` module, too, and those to which
they are exported a ``_target`` module: see :mod:`marlin.formats.source` and
:mod:`marlin.formats.target`.
"""

from __future__ import annotations

from marlin.formats.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]
