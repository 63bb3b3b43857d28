"""Checkpoint formats: one module each, with its configuration and its pure tensor functions."""

from __future__ import annotations

from marlin.formats.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]
