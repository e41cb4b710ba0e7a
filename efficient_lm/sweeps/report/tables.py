"""The tables of a report: arms, runs, what their configs differ in, and what is missing."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from efficient_lm.pages.table import Cell, Column, Table
from efficient_lm.sweeps.report.arms import Arms, differences, last, natural, shown
from efficient_lm.sweeps.report.charts import counted
from efficient_lm.sweeps.report.measures import BY_NAME, COSTS, OTHERS, QUALITY, heading, known
from efficient_lm.sweeps.report.runs import Run

FEW, LISTED = 6, 5
"""Arms up to which a table of differences has a column for each; values of an arm up to which each is said."""
PLACES = 4
"""Of losses and accuracies."""
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def number(value: float | None, name: str = "") -> str:
    """A figure as text: measures of quality to four places, others to four digits."""
    if value is None:
        return "–"
    if name in {measure.name for measure in QUALITY}:
        return f"{value:.{PLACES}f}"
    size = abs(value)
    for factor, letter in UNITS:
        if size >= factor:
            return f"{value / factor:.{max(0, 3 - math.floor(math.log10(size / factor)))}f} {letter}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}" if size >= 1e-3 else f"{value:.3e}"


def spread(values: Sequence[float], name: str = "") -> Cell:
    """A mean, with the range where there are several."""
    if not values:
        return Cell()
    mean = sum(values) / len(values)
    ranged = len(values) > 1 and min(values) < max(values)
    note = f"{number(min(values), name)} to {number(max(values), name)}" if ranged else ""
    return Cell(number(mean, name), mean, note=note)


def arms_table(arms: Arms) -> Table:
    """An arm a row, at the learning rate that is best for it: means and ranges over its seeds."""
    settings = [arms.best(arm) for arm in arms.arms]
    names = {name for each in settings if each for run in each.runs if run.ended for name in run.figures}
    measures = known((*arms.quality, *COSTS, *OTHERS), names)
    # Words are in the label, and sort there; numbers do not.
    axes = [axis for axis in arms.axes if any(isinstance(arm.choices.get(axis), int | float) for arm in arms.arms)]
    rated = any(len(arm.settings) > 1 for arm in arms.arms)
    columns = [Column("arm"), *(Column(last(axis, "kind"), about=axis) for axis in axes)]
    columns += [Column("best learning rate", True)] if rated else []
    columns += [Column("seeds", True, "runs that ended, of those there are"), *(
        Column(heading(measure.name), True, measure.label) for measure in measures)]  # fmt: skip
    rows = []
    for arm, setting in zip(arms.arms, settings, strict=True):
        there = [] if setting is None else setting.runs
        ended = sum(run.ended for run in there)
        row = [Cell(arm.label, arm.label)]
        row += [Cell(shown(arm.choices[axis]), shown(arm.choices[axis])) if axis in arm.choices else Cell()
                for axis in axes]  # fmt: skip
        if rated:
            row.append(Cell() if setting is None or setting.rate is None else Cell(shown(setting.rate), setting.rate))
        missing = len(there) - ended if setting else len(arm.runs)
        row.append(Cell(f"{ended}", ended, note=f"{missing} not ended" if missing else ""))
        row += [spread([] if setting is None else setting.values(measure.name), measure.name) for measure in measures]
        rows.append(row)
    place = len(columns) - len(measures)
    marked = [_best_marked(rows, place + index, measure.more) if measure in QUALITY else None
              for index, measure in enumerate(measures)]  # fmt: skip
    rows = [[_marked(cell) if column >= place and marked[column - place] == number else cell
             for column, cell in enumerate(row)] for number, row in enumerate(rows)]  # fmt: skip
    caption = "No run has come to an end yet."
    if measures:
        caption = (
            f"{counted(len(arms.arms), 'arm')}, each at the learning rate with the best {heading(measures[0].name)}: "
            "the mean over seeds, and its range where there are several. The best loss and the best accuracy stand out."
        )
    return Table("arms", caption, columns, rows)


def sizes_table(arms: Arms) -> Table | None:
    """The models nested in those of arms, a row for each; None where no model has any."""
    found = [(arm, setting.sizes) for arm in arms.arms if (setting := arms.best(arm)) is not None and setting.sizes]
    names = {name for _, sizes in found for setting in sizes.values() for run in setting.runs for name in run.figures}
    measures = known((*arms.quality, *COSTS), names)
    columns = [Column("arm"), Column("size", True)]
    columns += [Column(heading(measure.name), True, measure.label) for measure in measures]
    rows = [
        [Cell(arm.label, arm.label), Cell(name, parameters),
         *(spread(setting.values(measure.name), measure.name) for measure in measures)]
        for arm, sizes in found
        for name, setting in sizes.items() if (parameters := setting.mean("parameters")) is not None
    ]  # fmt: skip
    caption = "Sizes nested in one model, each as it is by itself when it is extracted."
    return Table("sizes", caption, columns, rows) if rows else None


def _best_marked(rows: Sequence[Sequence[Cell]], column: int, more: bool) -> int | None:
    sign = -1 if more else 1
    scored = [(sign * row[column].order, place) for place, row in enumerate(rows) if row[column].order is not None]
    return min(scored)[1] if len(scored) > 1 else None


def _marked(cell: Cell) -> Cell:
    return Cell(cell.text, cell.order, cell.link, cell.note, marked=True)


def runs_table(runs: Sequence[Run], output: Path) -> Table:
    """A run a row, with a link to its directory."""
    names = {name for run in runs for name in run.figures}
    measures = known((*QUALITY, *OTHERS, *COSTS), names)
    others = sorted(names - set(BY_NAME))
    shown_names = [*(measure.name for measure in measures), *others]
    columns = [Column("run"), Column("state"), Column("learning rate", True), Column("seed", True)]
    columns += [Column(heading(name), True, BY_NAME[name].label if name in BY_NAME else name) for name in shown_names]
    rows = []
    for run in runs:
        rate = Cell() if run.learning_rate is None else Cell(shown(run.learning_rate), run.learning_rate)
        seed = Cell() if run.seed is None else Cell(str(run.seed), run.seed)
        figures = [run.figures.get(name) for name in shown_names]
        rows.append([
            Cell(run.name, run.name, link=link(run.path, output)), Cell(run.state, run.state, marked=not run.ended),
            rate, seed,
            *(Cell(number(value, name), value) for name, value in zip(shown_names, figures, strict=True)),
        ])  # fmt: skip
    caption = f"{counted(len(runs), 'run')} as at their end, or as far as they got; names lead to their directories."
    return Table("runs", caption, columns, rows)


def faults_table(runs: Sequence[Run], output: Path) -> Table:
    """Runs of which something is missing, and what."""
    found = [run for run in runs if not run.ended or run.faults]
    columns = [Column("run"), Column("state"), Column("what is missing", wraps=True)]
    rows = [
        [Cell(run.name, run.name, link=link(run.path, output)), Cell(run.state, run.state),
         Cell("; ".join(run.faults) or "–", "; ".join(run.faults))] for run in found
    ]  # fmt: skip
    out = sum(not run.ended for run in found)
    caption = f"Of {counted(len(runs), 'run')}, {out} did not come to an end and are left out of means and comparisons."
    return Table("missing", caption, columns, rows)


def differences_table(arms: Arms) -> Table | None:
    """Keys whose values are not the same everywhere; those that most arms do not have stand out."""
    read = [(arm, [run for run in arm.runs if run.config]) for arm in arms.arms]
    read = [(arm, runs) for arm, runs in read if runs]
    configs = [run.config for _, runs in read for run in runs]
    keys = differences(configs)
    if not keys:
        return None
    texts = {key: [_values(runs, key) for _, runs in read] for key in keys}
    usual = {key: _usual(said) for key, said in texts.items()}

    def cell(key: str, place: int) -> Cell:
        text = texts[key][place]
        return Cell(text, text, marked=usual[key] is not None and text != usual[key])

    caption = (
        f"{counted(len(keys), 'key')} of config.yaml in which {counted(len(configs), 'run')} differ; values other than "
        "the most frequent one stand out. “absent”: the config has no such key."
    )
    places = range(len(read))
    if len(read) <= FEW:
        columns = [Column("key"), *(Column(arm.label) for arm, _ in read)]
        rows = [[Cell(key, key), *(cell(key, place) for place in places)] for key in keys]
    else:
        columns = [Column("arm"), *(Column(key) for key in keys)]
        rows = [[Cell(read[place][0].label, read[place][0].label), *(cell(key, place) for key in keys)]
                for place in places]  # fmt: skip
    return Table("differences", caption, columns, rows)


def _values(runs: Sequence[Run], key: str) -> str:
    """The value that an arm's runs have; of several the few there are, or how many."""
    values = {shown(run.config[key]) if key in run.config else "absent": run.config.get(key) for run in runs}
    found = sorted(values, key=lambda text: natural(values[text]))
    return ", ".join(found) if len(found) <= LISTED else f"{len(found)} values"


def _usual(texts: Sequence[str]) -> str | None:
    """The value that most have; None where no value is more frequent than all others."""
    (first, count), *others = Counter(texts).most_common(2)
    return first if not others or count > others[0][1] else None


def link(path: Path, output: Path) -> str:
    """From a page in `output` to a run's directory; none where there is no directory."""
    if not path.is_dir():
        return ""
    return quote(os.fsencode(os.path.relpath(path.resolve(), output.resolve()))) + "/"
