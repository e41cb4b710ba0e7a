"""What came out of a sweep: a row for every run in `table.json` and `table.csv`, and a line for every arm.

``{"sweep": name, "metric": ..., "larger_is_better": ..., "objectives": [...], "axes": [keys], "rows": [...]}``; a row
has `name`, `choices` (key → value), `seed`, `state` (waiting, running, interrupted, finished, pruned, failed), `run`
(its directory, relative to the sweep's), `figures` (numbers of `summary.json`, and those counted before) and `reason`.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from efficient_lm.sweeps.axes import as_word
from efficient_lm.sweeps.outcomes import number
from efficient_lm.sweeps.searches import Objective
from efficient_lm.training.reporting import write_atomically, write_json_atomically

STATES = ("waiting", "running", "interrupted", "finished", "pruned", "failed")
ENDED = ("finished", "pruned", "failed")


@dataclass
class Row:
    """A run.

    Attributes:
        run: its directory, relative to the sweep's.
        figures: by name.
        reason: of what is neither finished nor waiting.
    """

    name: str
    choices: dict[str, Any]
    seed: int | None
    state: str
    run: str
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Line:
    """An arm: runs that differ in their seeds alone.

    Attributes:
        values: figure → its values of the runs that are finished.
    """

    choices: Mapping[str, Any]
    rows: Sequence[Row]
    values: Mapping[str, Sequence[float]]

    def mean(self, name: str) -> float | None:
        """Of a figure; None if no finished run has it."""
        return statistics.fmean(self.values[name]) if self.values.get(name) else None

    def said(self, name: str) -> str:
        """A figure as text: the mean, and the range over several seeds."""
        values = self.values.get(name)
        if not values:
            return ""
        if min(values) == max(values):
            return shown(values[0], name)
        return f"{shown(self.mean(name), name)} ({shown(min(values), name)} to {shown(max(values), name)})"

    @property
    def state(self) -> str:
        """What the runs have come to: a word, or how many of each."""
        states = [row.state for row in self.rows]
        counts = [(state, states.count(state)) for state in STATES if state in states]
        return counts[0][0] if len(counts) == 1 else ", ".join(f"{count} {state}" for state, count in counts)


def lines(rows: Iterable[Row], objectives: Sequence[Objective]) -> list[Line]:
    """The arms, best first by the first objective; those without it last, in their order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple((key, str(value)) for key, value in row.choices.items()), []).append(row)
    found = []
    for group in groups.values():
        names = dict.fromkeys(name for row in group for name in row.figures)
        good = [row for row in group if row.state == "finished"]
        values = {
            name: [row.figures[name] for row in good if number(row.figures.get(name)) is not None] for name in names
        }
        found.append(Line(group[0].choices, group, values))
    first = objectives[0]

    def order(line: Line) -> tuple[bool, float]:
        mean = line.mean(first.name)
        return mean is None, 0.0 if mean is None else -mean if first.larger else mean

    return sorted(found, key=order)


def front(found: Sequence[Line], objectives: Sequence[Objective]) -> list[Line]:
    """The arms that no other is better than in one objective and as good as in all."""

    def place(line: Line) -> list[float] | None:
        means = [line.mean(objective.name) for objective in objectives]
        if None in means:
            return None
        return [-mean if objective.larger else mean for mean, objective in zip(means, objectives, strict=True)]

    places = [(line, here) for line in found if (here := place(line)) is not None]
    return [
        line
        for line, here in places
        if not any(there != here and all(t <= h for t, h in zip(there, here, strict=True)) for _, there in places)
    ]


def write_table(
    folder: Path, name: str, keys: Sequence[str], rows: Sequence[Row], objectives: Sequence[Objective]
) -> None:
    """Write `table.json` and `table.csv`, each whole or not at all."""
    facts = {
        "sweep": name,
        "metric": objectives[0].name,
        "larger_is_better": objectives[0].larger,
        "objectives": [objective.name for objective in objectives],
        "axes": list(keys),
    }
    write_json_atomically(folder / "table.json", {**facts, "rows": [asdict(row) for row in rows]})
    figures = list(dict.fromkeys(figure for row in rows for figure in row.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *keys, "seed", "state", "run", *figures, "reason"])
    for row in rows:
        chosen = [as_word(row.choices[key]) if key in row.choices else "" for key in keys]
        measured = [row.figures.get(figure, "") for figure in figures]
        seed = "" if row.seed is None else row.seed
        writer.writerow([row.name, *chosen, seed, row.state, row.run, *measured, row.reason])
    write_atomically(folder / "table.csv", text.getvalue())


def shown(value: Any, name: str = "") -> str:
    """A value for people; counts with their thousands, large ones by their size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if name == "deviation":
        return f"{value:+.2%}"
    if name.endswith("seconds"):
        return f"{value:,.1f}"
    if "flops" in name or abs(value) >= 1e9:
        return f"{value:.4g}"
    if isinstance(value, int) or float(value).is_integer() and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}"
