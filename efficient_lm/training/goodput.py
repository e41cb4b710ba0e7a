"""Goodput: the share of a run's wall time, since its first start, that went into steps that count.

`sessions.jsonl` in a run directory is only ever appended to: a line where a session starts, one at each logged row and
each checkpoint, one where it ends. What a killed session had reached is therefore known, and with where the next one
began so is what had to be done again.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficient_lm.training.clock import PHASES, STEPPING, stepping_seconds
from efficient_lm.training.processes import is_main

log = logging.getLogger(__name__)

SESSIONS_FILE = "sessions.jsonl"
COMPLETE = "complete"
"""The event of a session that ended because every step was done: the time until anyone starts it again is nobody's."""
OVERHEADS = [phase for phase in PHASES if phase not in STEPPING]


class Sessions:
    """`sessions.jsonl` of a run, to which this process's session is added.

    A run never fails for it: what cannot be written is one warning. Of many processes, process 0 writes.

    Args:
        step: at which this session begins.
        elapsed: seconds since this session began, before the file could be opened.
    """

    def __init__(self, run_dir: str | Path, step: int, elapsed: float = 0.0, now: Callable[[], float] = time.time):
        self.path, self._now = Path(run_dir) / SESSIONS_FILE, now
        self._writes = is_main()
        rows = read_sessions(run_dir)
        self._session = max((row["session"] for row in rows), default=0) + 1
        self._append({"event": "start", "step": step}, now() - elapsed)

    def beat(self, step: int, seconds: dict[str, float], event: str = "beat") -> None:
        """Say how far this session is, and what its time was spent on: seconds by phase (see `training.clock`)."""
        rounded = {phase: round(value, 4) for phase, value in seconds.items()}
        self._append({"event": event, "step": step, "seconds": rounded}, self._now())

    def _append(self, row: dict[str, Any], moment: float) -> None:
        if not self._writes:
            return
        line = json.dumps({"session": self._session, "time": round(moment, 3), **row}) + "\n"
        try:
            with open(self.path, "ab") as file:
                # A line that was torn by a crash stays a line of its own.
                torn = file.tell() > 0 and not _ends_a_line(self.path)
                file.write(b"\n" * torn + line.encode())
        except OSError as error:
            self._writes = False
            log.warning("%s cannot be written (%s): goodput is left out from here on", self.path, error.strerror)


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `sessions.jsonl`, without lines that were torn; none where there is no file."""
    try:
        lines = (Path(run_dir) / SESSIONS_FILE).read_bytes().split(b"\n")
    except OSError:
        return []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    wanted = {"session", "time", "step", "event"}
    whole = isinstance(row, dict) and wanted <= set(row) and (row["event"] == "start" or "seconds" in row)
    return row if whole else None


@dataclass
class _Tally:
    """What the rows read so far add up to."""

    pieces: list[tuple[int, int, float]] = field(default_factory=list)
    """Of steps that count so far: from, to, seconds."""
    overheads: Counter[str] = field(default_factory=Counter)
    lost_steps: int = 0
    lost_seconds: float = 0.0
    down: float = 0.0

    def start(self, step: int) -> None:
        """What was done beyond this step is lost."""
        kept = []
        for begin, end, seconds in self.pieces:
            share = 1.0 if end <= step else max(step - begin, 0) / max(end - begin, 1)
            self.lost_steps += max(end - max(begin, step), 0)
            self.lost_seconds += (1 - share) * seconds
            if share > 0:
                kept.append((begin, min(end, step), share * seconds))
        self.pieces = kept


def goodput(rows: list[dict[str, Any]]) -> dict[str, float | int] | None:
    """What `sessions.jsonl` says of a run; None if it has no row.

    Returns:
        `goodput`: `training_seconds` over `wall_seconds`; `wall_seconds`: since the first start, and the sum of all
        other seconds: `training_seconds` (steps that count), `lost_seconds` (steps that were done again: `lost_steps`
        of them are known), `startup_seconds`, `restore_seconds`, `compile_seconds`, `evaluation_seconds`,
        `checkpoint_seconds` and `down_seconds` (between the last sign of a session and the next one's start);
        `sessions`, their number.
    """
    if not rows:
        return None
    tally, before = _Tally(), None
    for row in rows:
        if row["event"] == "start" or before is None:
            if before is not None and before["event"] != COMPLETE:
                tally.down += max(row["time"] - before["time"], 0.0)
            tally.start(row["step"])
            spent = dict.fromkeys(PHASES, 0.0)
        else:
            if row["step"] < before["step"]:
                tally.start(row["step"])
            begin = min(before["step"], row["step"])
            now = dict.fromkeys(PHASES, 0.0) | row["seconds"]
            tally.pieces.append((begin, row["step"], stepping_seconds(now) - stepping_seconds(spent)))
            for phase in OVERHEADS:
                tally.overheads[phase] += now[phase] - spent[phase]
            spent = now
        before = row
    return _summed(tally, len({row["session"] for row in rows}))


def _summed(tally: _Tally, sessions: int) -> dict[str, float | int]:
    training = sum(seconds for _, _, seconds in tally.pieces)
    parts = {"training": training, "lost": tally.lost_seconds}
    parts |= {phase: tally.overheads[phase] for phase in OVERHEADS} | {"down": tally.down}
    wall = sum(parts.values())
    return {
        "goodput": training / wall if wall > 0 else 0.0,
        "wall_seconds": wall,
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "lost_steps": tally.lost_steps,
        "sessions": sessions,
    }
