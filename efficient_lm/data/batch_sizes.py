"""How many rows the batch of each step has, and which: those behind the rows of the steps before it."""

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from itertools import pairwise


class BatchSizes:
    """Rows of each step's batch, a number for each stage of a run.

    Row ``first(step) + b`` of the endless sequence of rows is row b of the batch of that step.

    Args:
        stages: (step it begins with, rows of each batch) of every stage, in order; the first begins with step 0, and
            the last does not end.
    """

    def __init__(self, stages: Sequence[tuple[int, int]]):
        self._steps = [step for step, _ in stages]
        self._rows = [rows for _, rows in stages]
        self._before = [0]
        for (step, rows), (following, _) in pairwise(stages):
            self._before.append(self._before[-1] + (following - step) * rows)

    @classmethod
    def of(cls, given: "int | BatchSizes") -> "BatchSizes":
        """Those given, or one number for every step."""
        return given if isinstance(given, BatchSizes) else cls([(0, given)])

    def behind(self, rows: int) -> "BatchSizes":
        """The same sizes, of rows that lie so far behind."""
        moved = copy(self)
        moved._before = [before + rows for before in self._before]
        return moved

    @property
    def distinct(self) -> set[int]:
        """All numbers of rows there are."""
        return set(self._rows)

    def rows(self, step: int) -> int:
        """Rows of the batch of a step."""
        return self._rows[self._stage(step)]

    def first(self, step: int) -> int:
        """Rows of all batches before a step."""
        stage = self._stage(step)
        return self._before[stage] + (step - self._steps[stage]) * self._rows[stage]

    def _stage(self, step: int) -> int:
        return bisect_right(self._steps, step) - 1
