"""What every measure has: figures by name, of a trained run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from efficient_lm.spec import Choice

Figures = dict[str, float]
"""What was measured, by name: a column of the page each."""


class MeasureSpec(Choice, role="measure"):
    """What is measured of every run once it is trained.

    Attributes:
        about: what the page says the figures are.
    """

    about: ClassVar[str] = ""

    @property
    def reads(self) -> str | None:
        """The arm whose runs are looked at besides, each beside the run of the same seed; it is trained first."""
        return None

    def quality(self, figures: Mapping[str, float]) -> float:
        """What learning rates are chosen by; more is better."""
        raise TypeError(f"{type(self).__name__} does not define quality")

    def measure(self, run: Path, other: Path | None) -> tuple[Figures, dict[str, Any]]:
        """The figures of a run, and what they were made of, as JSON has it.

        Args:
            run: its folder.
            other: the folder of the arm that it `reads`; None if this run is that arm's, or none is read.
        """
        raise TypeError(f"{type(self).__name__} does not define measure")

    @property
    def picture(self) -> Callable[[Sequence[Mapping[str, Any]], Path, str], Any] | None:
        """``(rows, path, title)``: draws the page's picture; None if a table says enough."""
        return None
