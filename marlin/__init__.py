"""Fast 4-bit-weight matrix multiplication for LLM inference, as PyTorch ops and layers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from marlin import _library as _library  # loads torch.ops.marlin
from marlin.convert import ConversionReport, convert
from marlin.export import export
from marlin.formats.checkpoint import CheckpointError
from marlin.fuse import FuseReport, fuse, unfuse
from marlin.fused_linear import FusedLinear
from marlin.linear import MarlinLinear
from marlin.linear24 import MarlinLinear24
from marlin.load import load
from marlin.replace import ReplaceReport, replace_linear
from marlin.verify import VerifyReport, verify

try:
    __version__ = version("marlin")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "FuseReport",
    "FusedLinear",
    "MarlinLinear",
    "MarlinLinear24",
    "ReplaceReport",
    "VerifyReport",
    "__version__",
    "convert",
    "export",
    "fuse",
    "load",
    "replace_linear",
    "unfuse",
    "verify",
]
