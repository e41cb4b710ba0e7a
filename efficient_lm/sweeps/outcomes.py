"""What became of a run: from its exit status, its run directory and the last lines of its log. Imports no jax."""

import fcntl
import json
import math
import os
import signal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from efficient_lm.errors import CheckpointError, ConfigError, DataError, DivergedError, ResourceError
from efficient_lm.sweeps.launchers.base import UNKNOWN
from efficient_lm.training.reporting import METRICS_FILE

STATUSES = {
    ConfigError.status: "config",
    DataError.status: "data",
    CheckpointError.status: "checkpoint",
    DivergedError.status: "diverged",
    ResourceError.status: "resources",
}
TAIL_BYTES = 1 << 16


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        kind: ``stopped``: it can go on where it was.
        reason: of what is not complete.
        figures: scalars of `summary.json`, of this session or one before.
    """

    kind: Literal["complete", "stopped", "failed"]
    reason: str
    figures: dict[str, Any]


def outcome(directory: Path, status: int, log: Path) -> Outcome:
    """What became of a run that ended with an exit status, `UNKNOWN` if nobody knows it."""
    summary = _summary(directory)
    figures = scalars(summary or {})
    stopped = (summary or {}).get("stopped_by")
    if summary is not None and stopped not in signal.Signals.__members__ and status in (0, UNKNOWN):
        return Outcome("complete", "", figures)
    reason = f"{status_name(status)}: {last_error(log)}".removesuffix(": ")
    if status == UNKNOWN or by_signal(status) or status == ResourceError.status or (status == 0 and stopped):
        return Outcome("stopped", reason, figures)
    if status == CheckpointError.status and in_use(directory):
        return Outcome("stopped", reason, figures)
    return Outcome("failed", reason if status else "ended without a summary", figures)


def is_complete(directory: Path) -> bool:
    """Whether a run has nothing left to do."""
    return outcome(directory, UNKNOWN, directory / "none").kind == "complete"


def scalars(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a summary."""
    return {
        name: value for name, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def status_name(status: int) -> str:
    """An exit status in words: ``diverged``, ``SIGKILL``."""
    number = by_signal(status)
    if number:
        return signal.Signals(number).name if number in signal.Signals else f"signal {number}"
    if status == UNKNOWN:
        return "ended unseen"
    return STATUSES.get(status, f"exit status {status}")


def by_signal(status: int) -> int:
    """The signal that ended a process, as `subprocess` or a shell tells it; 0: none did."""
    if status == UNKNOWN:
        return 0
    return -status if status < 0 else status - 128 if 128 < status < 128 + signal.NSIG else 0


def last_error(log: Path) -> str:
    """The last line of a log that says what is wrong, or else its last line; "" if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    faults = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (faults or lines or [""])[-1][:300]


def saved_step(directory: Path) -> int:
    """The newest step of which a run has a checkpoint; 0: none."""
    try:
        return max(
            (int(entry.name) for entry in os.scandir(directory / "checkpoints") if entry.name.isdecimal()), default=0
        )
    except OSError:
        return 0


def in_use(directory: Path) -> bool:
    """Whether a process is writing to a run directory."""
    try:
        lock = os.open(directory / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _summary(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Tail:
    """Rows of a run's `metrics.jsonl` as they come; from the start where the file was written anew."""

    def __init__(self, directory: Path):
        self._path = directory / METRICS_FILE
        self._file, self._offset = 0, 0

    def rows(self) -> list[dict[str, Any]]:
        """Those that are there and were not given back yet."""
        try:
            found = self._path.stat()
            if found.st_ino != self._file or found.st_size < self._offset:
                self._file, self._offset = found.st_ino, 0
            if found.st_size == self._offset:
                return []
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for row in map(_row, whole.splitlines()) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
