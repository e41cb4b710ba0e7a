"""What a sweep tells people: tables, and how far it is. Imports no jax."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text

from efficient_lm import terminal
from efficient_lm.sweeps.arms import Arm
from efficient_lm.sweeps.axes import as_word
from efficient_lm.sweeps.checking import Checked
from efficient_lm.sweeps.running import Active
from efficient_lm.sweeps.searches import Objective
from efficient_lm.sweeps.table import ENDED, STATES, Line, Row, front, shown

SHOWN_RUNS = 16
CHECKS_SECONDS = 10
"""Between lines that say how many arms were checked."""
PLAIN_WIDTH = 400
"""Of tables that no terminal shows: no line is folded."""


def console() -> rich.console.Console:
    """Where tables go."""
    found = terminal.console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else terminal.console(highlight=False, width=PLAIN_WIDTH)


def checks_watched[Answer](out: rich.console.Console, answers: Iterable[Answer], total: int) -> list[Answer]:
    """The answers to questions that may take a minute of compiling each: how far they are is said now and then."""
    if out.is_terminal:
        return list(track(answers, "checking arms", total=total, console=out, transient=True))
    found, said = [], time.monotonic()
    for answer in answers:
        found.append(answer)
        if len(found) < total and time.monotonic() - said > CHECKS_SECONDS:
            out.print(f"checked {len(found)} of {total} arms", markup=False)
            said = time.monotonic()
    return found


def plan_table(arms: Sequence[Arm], checked: Sequence[Checked], keys: Sequence[str]) -> Table:
    """What will run, a line for each arm without its seeds."""
    columns = list(dict.fromkeys(name for each in checked for name in each.known.columns))
    figures = list(dict.fromkeys(name for each in checked for name in each.figures if name not in columns))
    memory = any(each.known.memory_bytes is not None for each in checked)
    table = _table("", keys, [*columns, *figures, *(["memory"] if memory else [])])
    for place, (arm, each) in enumerate(zip(arms, checked, strict=True), start=1):
        cells = [shown(each.known.columns.get(name), name) for name in columns]
        cells += [shown(each.figures.get(name), name) for name in figures]
        cells += [f"{each.known.memory_bytes / 1e9:.2f} GB"] if memory else []
        table.add_row(str(place), *_words(arm.choices, keys), *cells)
    return table


def result_table(found: Sequence[Line], keys: Sequence[str], objectives: Sequence[Objective]) -> Table:
    """What came out, a line for each arm: the mean, and the range over seeds."""
    names = [objective.name for objective in objectives]
    others = ("val_loss", "val_bits_per_byte", "val_accuracy", "parameters", "training_flops", "seconds")
    names += [name for name in others if name not in names and any(line.values.get(name) for line in found)]
    best = front(found, objectives) if len(objectives) > 1 else []
    table = _table("", keys, names, ["runs"])
    for place, line in enumerate(found, start=1):
        first = "front" if line in best else "" if best or line.mean(names[0]) is None else str(place)
        cells = [*_words(line.choices, keys), *map(line.said, names), line.state]
        table.add_row(first, *cells, style="bold" if first in ("1", "front") else None)
    return table


def _words(choices: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [as_word(choices[key]) if key in choices else "" for key in keys]


def _table(first: str, keys: Sequence[str], numbers: Sequence[str], last: Sequence[str] = ()) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column(first)
    for key in keys:
        table.add_column(key)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in last:
        table.add_column(name)
    return table


class Display:
    """Lines as runs begin and end; on a terminal also what runs now, below them.

    Args:
        total: how many runs there are.
    """

    def __init__(self, out: rich.console.Console, total: int, objective: Objective):
        self._console, self._total, self._objective = out, total, objective
        self._before: dict[str, str] = {}
        self._rows: list[Row] = []
        self._active: list[Active] = []
        self._began = time.monotonic()
        self._live = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal else None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While the sweep runs."""
        with self._live or contextlib.nullcontext():
            yield

    @property
    def watches(self) -> bool:
        """Whether it shows what runs now."""
        return self._live is not None

    def changed(self, rows: list[Row]) -> None:
        """The state of a run has changed."""
        first, self._rows = not self._before, rows
        for row in rows:
            if row.state != self._before.get(row.name, "waiting") and not (first and row.state in ENDED):
                self._say(row)
            self._before[row.name] = row.state
        if first and any(row.state in ENDED for row in rows):
            self._console.print(f"going on: {self._counts()}", markup=False)
        self._refresh()

    def watched(self, active: list[Active]) -> None:
        """What runs now."""
        self._active = active
        self._refresh()

    def _say(self, row: Row) -> None:
        value = row.figures.get(self._objective.name)
        said = f"  {self._objective.name} {shown(value, self._objective.name)}" if row.state == "finished" else ""
        said += f"  {row.reason}" if row.reason else ""
        ended = sum(each.state in ENDED for each in self._rows)
        self._console.print(f"{ended}/{self._total}  {row.name}  {row.state}{said}", markup=False, soft_wrap=True)

    def _counts(self) -> str:
        counts = Counter(row.state for row in self._rows)
        return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])

    def _refresh(self) -> None:
        if self._live is None:
            return
        running = {active.arm: active for active in self._active}
        table = Table(box=None, pad_edge=False, show_header=False)
        rows = [row for row in self._rows if row.state == "running"]
        for row in rows[:SHOWN_RUNS]:
            table.add_row(Text(row.name, "cyan"), *_progress(running.get(row.name)))
        if len(rows) > SHOWN_RUNS:
            table.add_row(Text(f"and {len(rows) - SHOWN_RUNS} more", "dim"))
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        table.add_row(Text(f"{self._counts()} of {self._total}; {minutes}:{seconds:02}", "dim"))
        self._live.update(table, refresh=True)


def _progress(active: Active | None) -> Iterator[str]:
    """How far a run is; nothing of one that is starting, or that another process has."""
    if active is None or "step" not in active.last:
        return
    last = active.last
    yield f"step {last['step']:,}/{active.trial.user_attrs['steps']:,}"
    for name in ("loss", "val_loss"):
        if isinstance(last.get(name), float):
            yield f"{name} {last[name]:.4f}"
