"""The one error of this package for input that it refuses."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_REFUSALS = 40


class Refusal(str):
    """A reason for a refusal, with the command-line option that lifts it."""

    __slots__ = ("option",)
    option: str

    def __new__(cls, reason: str, *, option: str) -> Refusal:
        made = super().__new__(cls, reason)
        made.option = option
        return made


class CheckpointError(ValueError):
    """A checkpoint was refused. ``refusals`` lists every reason found, not only the first."""

    def __init__(self, refusals: str | Sequence[str], *, where: object = None) -> None:
        self.refusals: tuple[str, ...] = (
            (refusals,) if isinstance(refusals, str) else tuple(refusals)
        )
        prefix = "" if where is None else f"{where}: "
        if len(self.refusals) == 1:
            message = prefix + self.refusals[0]
        else:
            shown = [f"  - {reason}" for reason in self.refusals[:SHOWN_REFUSALS]]
            if len(self.refusals) > SHOWN_REFUSALS:
                shown.append(f"  - and {len(self.refusals) - SHOWN_REFUSALS} more")
            message = f"{prefix}{len(self.refusals)} problems\n" + "\n".join(shown)
        super().__init__(message)

    @property
    def options(self) -> list[str]:
        """Command-line options that lift some of the reasons."""
        return sorted({reason.option for reason in self.refusals if isinstance(reason, Refusal)})
