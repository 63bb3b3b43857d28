"""The one error of this package for input that it refuses."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_REFUSALS = 40


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
