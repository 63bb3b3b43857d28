"""Which format a checkpoint is in, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from marlin.formats.awq_source import AwqFormat
from marlin.formats.checkpoint import Checkpoint, CheckpointError
from marlin.formats.compressed_tensors_source import CompressedTensorsFormat
from marlin.formats.gptq_source import GptqFormat
from marlin.formats.marlin_24_source import SparseMarlinFormat
from marlin.formats.native_source import NativeFormat
from marlin.formats.original_marlin_source import OriginalMarlinFormat
from marlin.formats.source import SourceFormat

FORMATS: dict[str, Callable[[Checkpoint], SourceFormat]] = {
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
}
TILES = (SparseMarlinFormat, OriginalMarlinFormat)  # the latter's method may name the former, too
# What quantization_config may name. Beside "marlin", which is this package's own, too.
METHODS = ("gptq", *FORMATS, "gptq_marlin_24", "marlin_24")


def source_format(checkpoint: Checkpoint) -> SourceFormat:
    """The format that ``quantization_config.quant_method`` names, with the checkpoint's settings.

    Without any settings but the file of AWQ tools, AWQ. Settings of GPTQ, or of no name, may say
    that the packing is the original Marlin kernel's or Sparse-Marlin's. Anything else is read as
    GPTQ, which may lack the name and knows why others are refused. Raises :class:`CheckpointError`
    listing every setting that cannot be read, and for this package's own format.
    """
    if is_native(checkpoint):
        raise CheckpointError(
            "config.json: quantization_config.quant_method is 'marlin' with a format_version: this "
            "is in this package's own format already; load it as it is, or turn it into GPTQ with "
            "`marlin export`",
            where=checkpoint.directory,
        )
    inner = checkpoint.config.get("quantization_config")
    method = inner.get("quant_method") if isinstance(inner, Mapping) else None
    if inner is None and checkpoint.quantize_config is None and checkpoint.quant_config is not None:
        method = "awq"
    if isinstance(method, str) and method in FORMATS:
        return FORMATS[method](checkpoint)
    if method in (None, "marlin", *METHODS):
        for kind in TILES:
            if kind.is_named_in(checkpoint):
                return kind(checkpoint)
    return GptqFormat(checkpoint)


def is_native(checkpoint: Checkpoint) -> bool:
    """Whether ``marlin convert`` has written it."""
    inner = checkpoint.config.get("quantization_config")
    return (
        isinstance(inner, Mapping)
        and inner.get("quant_method") == "marlin"
        and "format_version" in inner
    )


def readable_format(checkpoint: Checkpoint) -> SourceFormat:
    """The same, and this package's own format beside those that are converted into it."""
    return NativeFormat(checkpoint) if is_native(checkpoint) else source_format(checkpoint)
