"""Which checkpoints of a run are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Rules that each keep some checkpoints; what none keeps is deleted.

    Attributes:
        newest: so many of the newest.
        every: those whose step is a multiple; None keeps none for that.
        best: so many of those with the lowest validation loss.
    """

    newest: int
    every: int | None = None
    best: int = 0

    def kept(self, steps: Sequence[int], losses: Mapping[int, float]) -> set[int]:
        """Of checkpoints at `steps`, in order, those to keep; `losses` are of those that were validated."""
        ranked = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], -step))
        spaced = [step for step in steps if self.every and step % self.every == 0]
        return {*steps[-self.newest :], *spaced, *ranked[: self.best]}
