"""What a checkpoint format offers to ``export``: how it stores the layers of a converted one.

A format is one subclass of :class:`TargetFormat`, listed in :data:`marlin.export.TARGETS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from marlin.formats.checkpoint import Checkpoint
from marlin.formats.shards import Entry
from marlin.formats.source import SourceLayer

if TYPE_CHECKING:
    from marlin.examine import Layer


class TargetFormat(ABC):
    """A format, with the settings that the layers of one checkpoint ask for.

    ``name``: the format as users choose it. ``stored_as``: the variant that it was settled on.
    """

    name: ClassVar[str]
    stored_as: str

    @abstractmethod
    def __init__(self, layers: Mapping[str, Layer]) -> None:
        """``layers`` by module name, none of which has :meth:`problems`."""

    @staticmethod
    @abstractmethod
    def problems(layer: SourceLayer) -> list[str]:
        """Why the format cannot hold a layer; its values are not read."""

    @abstractmethod
    def entries(self, layer: Layer) -> list[Entry]:
        """The tensors to be written for a layer."""

    @abstractmethod
    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The same, read, by leaf name.

        Raises :class:`CheckpointError` when the layer is not what it was when it was examined.
        """

    @abstractmethod
    def configs(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """The JSON files that hold the settings, by name: ``config.json`` and the format's own."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """What the user should know about the result."""
