"""Where a process's time goes: every moment between two readings belongs to one phase, so the phases add up."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

STEPPING = ("data_wait", "dispatch", "metrics_wait", "training")
"""Phases that steps consist of; `training` is what is none of the others."""

PHASES = ("startup", "restore", "compile", "evaluation", "checkpoint", *STEPPING)
"""Every phase, in the order of a run."""


class Clock:
    """Seconds by phase. A phase inside another interrupts it; nothing is measured twice and no device is waited for.

    A run is in `startup` until `begin`, and then in `training` wherever nothing else is measured.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._phase = now, "startup"
        self._seconds: Counter[str] = Counter()
        self._began = self._since = now()

    def begin(self) -> None:
        """From here on, what is not measured is training."""
        self._enter("training")

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """The seconds of the block belong to `phase`."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same items; the time until each one is there is `data_wait`."""
        source = iter(batches)
        while True:
            with self.measure("data_wait"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds so far of every phase, those without any included."""
        self._enter(self._phase)
        return {phase: self._seconds[phase] for phase in PHASES}

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._began

    def _enter(self, phase: str) -> None:
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


def stepping_seconds(seconds: dict[str, float]) -> float:
    """Of seconds by phase those that went into steps."""
    return sum(seconds[phase] for phase in STEPPING)
