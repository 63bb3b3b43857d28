"""Which format a checkpoint is in, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from marlin.formats.awq_source import AwqFormat
from marlin.formats.checkpoint import Checkpoint
from marlin.formats.compressed_tensors_source import CompressedTensorsFormat
from marlin.formats.gptq_source import GptqFormat
from marlin.formats.source import SourceFormat

FORMATS: dict[str, Callable[[Checkpoint], SourceFormat]] = {
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
}
METHODS = ("gptq", *FORMATS)  # what quantization_config.quant_method may be


def source_format(checkpoint: Checkpoint) -> SourceFormat:
    """The format that ``quantization_config.quant_method`` names, with the checkpoint's settings.

    Without any settings but the file of AWQ tools, AWQ. Anything else is read as GPTQ, which may
    lack the name and knows why others are refused. Raises :class:`CheckpointError` listing every
    setting that cannot be read.
    """
    inner = checkpoint.config.get("quantization_config")
    method = inner.get("quant_method") if isinstance(inner, Mapping) else None
    if inner is None and checkpoint.quantize_config is None and checkpoint.quant_config is not None:
        method = "awq"
    make = FORMATS.get(method) if isinstance(method, str) else None
    return GptqFormat(checkpoint) if make is None else make(checkpoint)
