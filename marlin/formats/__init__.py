"""Checkpoint formats: one module each, with its configuration and its pure tensor functions.

Those of which whole checkpoints are converted have a ``_source`` module, too: see
:mod:`marlin.formats.source`.
"""

from __future__ import annotations

from marlin.formats.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]
