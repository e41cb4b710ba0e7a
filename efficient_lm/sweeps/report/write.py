"""The report itself: a page, pictures, and a table for other programs."""

import csv
import datetime
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from efficient_lm.errors import ResourceError, storage_fault
from efficient_lm.pages.chart import Chart, Measure, drawn
from efficient_lm.pages.page import contents, escaped, heading_of, page, paragraph, section, tiles
from efficient_lm.pages.picture import picture
from efficient_lm.pages.table import Table, as_markdown, laid
from efficient_lm.sweeps.report import charts, tables
from efficient_lm.sweeps.report.arms import Arms, arms_of
from efficient_lm.sweeps.report.charts import counted
from efficient_lm.sweeps.report.measures import BY_NAME, PROGRESS, heading, ranked
from efficient_lm.sweeps.report.runs import ENDED, Run, read_all
from efficient_lm.sweeps.report.sources import Sources
from efficient_lm.training.reporting import write_atomically

PAGE, CSV, MARKDOWN = "report.html", "runs.csv", "report.md"
SIZES = 4
"""Of a family, from which on there may be IsoFLOP profiles."""
CURVE = 3
"""Points from which on a curve is one: validation may have come once."""
PICTURED = ("parameters", "training_flops_per_token", "flops_per_token", "latency_ms", "cache_bytes")
"""Costs that get a picture of quality against them."""
PARTS = {
    "loss": "Loss",
    "rate": "Learning rates",
    "quality": "Quality against cost",
    "compute": "Size and compute",
    "memory": "Recall against state size",
    "arm": "Arms",
    "size": "Sizes in one model",
    "run": "Runs",
    "incomplete": "Incomplete runs",
    "config": "What the configs differ in",
}
"""Parts of the page, in order; those without data are left out."""
DRAWN = {
    "losses": ("tokens", "flops", "seconds"),
    "envelopes": ("tokens", "seconds"),
    "rates": ("learning_rate",),
    "pareto": PICTURED,
    "recall": ("cache_bytes", "parameters"),
    "isoflop_profiles": ("parameters",),
    "isoflop_laws": ("flops",),
}
"""Every picture that a report may have: chart → what goes across."""


def report(sources: Sources, output: Path, title: str) -> list[Path]:
    """Write the report of runs into a folder.

    Returns:
        The files: `report.html`, `runs.csv`, `report.md`, and a PNG for each chart there is something for.

    Raises:
        ResourceError: the folder cannot be made or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"output: cannot write to {output}: {storage_fault(error) or error.strerror}") from error
    runs = read_all(sources.runs)
    arms = arms_of(runs, ranked(sources.metrics))
    arm_rows, run_rows, size_rows = tables.arms_table(arms), tables.runs_table(runs, output), tables.sizes_table(arms)
    ids = {arm.label: arm_rows.row(place) for place, arm in enumerate(arms.arms)}
    by_run = {str(run.path): run_rows.row(place) for place, run in enumerate(runs)}
    made = [charts.loss_chart(arms, by_run), charts.envelope_chart(arms), charts.rate_chart(arms, ids),
            charts.pareto_chart(arms, ids), charts.recall_chart(arms, ids),
            *_isoflop(arms, ids)]  # fmt: skip
    shown = {chart.name: chart for chart in made if chart is not None and chart.across and chart.up}
    pictures = _pictures(shown, output, arms.quality)
    text = page(title, *_body(runs, arms, sources, shown, arm_rows, size_rows, run_rows, output, pictures))
    # Names of folders may hold bytes that are no text.
    write_atomically(output / PAGE, text.encode("utf-8", "replace"))
    write_atomically(output / CSV, _csv(runs, output).encode("utf-8", "replace"))
    write_atomically(output / MARKDOWN, _markdown(title, arm_rows, size_rows, pictures).encode("utf-8", "replace"))
    return [output / PAGE, output / CSV, output / MARKDOWN, *pictures]


def _markdown(title: str, arms: Table, sizes: Table | None, pictures: Sequence[Path]) -> str:
    """The tables of arms and of sizes, and the pictures, for a page of a repository."""
    shown = "\n\n".join(f"{as_markdown(table)}\n{escaped(table.caption)}" for table in (arms, sizes) if table)
    drawn_here = "\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in pictures)
    return f"# {escaped(title)}\n\n{shown}\n\n{drawn_here}"


def _isoflop(arms: Arms, ids: dict[str, str]) -> list[Chart]:
    """The charts of IsoFLOP profiles, if any family has so many sizes; what fits them is only then imported."""
    sizes: dict[str, set[float]] = {}
    for arm in arms.arms:
        sizes.setdefault(arm.family, set()).update(run.figures.get("parameters", 0) for run in arm.runs if run.ended)
    if max(map(len, sizes.values()), default=0) < SIZES:
        return []
    from efficient_lm.sweeps.report.isoflop import isoflop_charts

    return isoflop_charts(arms, ids)


def _body(
    runs: Sequence[Run],
    arms: Arms,
    sources: Sources,
    shown: dict[str, Chart],
    arm_rows: Table,
    size_rows: Table | None,
    run_rows: Table,
    output: Path,
    pictures: Sequence[Path],
) -> list[str]:
    missing, differing = tables.faults_table(runs, output), tables.differences_table(arms)
    parts: dict[str, list[Chart | Table | None]] = {
        "loss": [shown.get("envelopes"), shown.get("losses")],
        "rate": [shown.get("rates")],
        "quality": [shown.get("pareto")],
        "compute": [shown.get("isoflop_profiles"), shown.get("isoflop_laws")],
        "memory": [shown.get("recall")],
        "arm": [arm_rows] if len(arms.arms) < len(runs) or any(run.sweep for run in runs) else [],
        "size": [size_rows],
        "run": [run_rows],
        "incomplete": [missing] if missing.rows else [],
        "config": [differing],
    }
    present = {name: [part for part in found if part is not None] for name, found in parts.items()}
    present = {name: found for name, found in present.items() if found}
    sections = [section(name, PARTS[name], *_html(found)) for name, found in present.items()]
    links = [(name, PARTS[name]) for name in present] + [("about", "About this page")]
    notes = [paragraph(note, "note") for note in sources.notes]
    return [_facts(runs, arms), contents(links), *notes, *sections, _about(sources, output, pictures)]


def _html(parts: Sequence[Chart | Table]) -> list[str]:
    """Charts have headings of their own where there are several."""
    found = []
    for part in parts:
        if isinstance(part, Chart):
            found += [heading_of(part.title)] if len(parts) > 1 else []
            found.append(drawn(part))
        else:
            found.append(laid(part))
    return found


def _facts(runs: Sequence[Run], arms: Arms) -> str:
    states = Counter(run.state for run in runs)
    said = ", ".join(f"{count} {state}" for state, count in states.most_common())
    facts = [("runs", f"{len(runs)}", said)]
    if 1 < len(arms.arms) < len(runs):
        seeds = len({run.seed for run in runs})
        facts.append(("arms", f"{len(arms.arms)}", counted(seeds, "seed") if seeds > 1 else ""))
    measure = next((each for each in arms.quality if any(arm.best(each) for arm in arms.arms)), None)
    if measure is not None:
        sign = -1 if measure.more else 1
        scored = [(sign * setting.mean(measure.name), arm.label) for arm in arms.arms
                  if (setting := arm.best(measure)) is not None]  # fmt: skip
        value, label = min(scored)
        facts.append((f"best {heading(measure.name)}", tables.number(sign * value, measure.name), label))
    seconds = sum(run.figures.get("seconds", 0) for run in runs)
    tokens = sum(run.figures.get("tokens", 0) for run in runs)
    if tokens:
        facts.append(("trained", _long(seconds), f"{tables.number(tokens)} tokens in all"))
    return tiles(facts)


def _long(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def _about(sources: Sources, output: Path, pictures: Sequence[Path]) -> str:
    links = "".join(
        f'<li><a href="{escaped(file.name)}">{escaped(file.name)}</a></li>'
        for file in (output / CSV, output / MARKDOWN, *pictures)
    )
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    read_from = ", ".join(str(folder) for folder in sources.folders[:8])
    read_from += f" and {len(sources.folders) - 8} more" if len(sources.folders) > 8 else ""
    names = ", ".join(BY_NAME[name].label for name in ("training_flops_per_token", "cache_bytes"))
    return section(
        "about",
        "About this page",
        paragraph(
            f"Made {now} by efficient-lm report, from {read_from}. Only runs in the states {' and '.join(ENDED)} are "
            f"compared. Costs such as {names} are those that the runs, or their sweep, wrote down; what no run knows "
            "is not listed. Beside this page:"
        ),
        f'<ul class="files">{links}</ul>',
    )


def _pictures(shown: dict[str, Chart], output: Path, quality: Sequence[Measure]) -> list[Path]:
    """A PNG of each chart, and of quality one for each cost; those of an earlier report that have no chart now go."""
    found: list[Path] = []
    for name, chart in shown.items():
        up = _upward(chart, quality)
        for across in _pictured(chart):
            path = picture(chart, output / f"{name}_{across.name}.png", across, up)
            found += [path] if path is not None else []
    for old in {output / f"{chart}_{across}.png" for chart, names in DRAWN.items() for across in names} - set(found):
        old.unlink(missing_ok=True)
    return found


def _upward(chart: Chart, quality: Sequence[Measure]) -> Measure:
    """What goes up in a picture: the first measure of quality, and along training the first that has curves."""

    def points(measure: Measure) -> int:
        found = (series.columns.get(measure.name, ()) for series in chart.series)
        return max((sum(value is not None for value in column) for column in found), default=0)

    least = CURVE if chart.across[0] in PROGRESS else 1
    there = [measure for measure in quality if measure in chart.up]
    return next((measure for measure in there if points(measure) >= least), (there or chart.up)[0])


def _pictured(chart: Chart) -> list[Measure]:
    """Axes that get a picture: of costs, those of an architecture that differ."""
    if chart.name == "losses":
        return list(chart.across)
    if chart.name != "pareto":
        return list(chart.across[:1])
    found = []
    for measure in chart.across:
        values = [value for series in chart.series for value in series.columns.get(measure.name, ()) if value]
        if measure.name in PICTURED and values and max(values) > 1.02 * min(values):
            found.append(measure)
    return found


def _csv(runs: Sequence[Run], output: Path) -> str:
    """A row for each run, for other programs."""
    figures = list(dict.fromkeys(name for run in runs for name in run.figures))
    axes = list(dict.fromkeys(axis for run in runs for axis in run.choices or ()))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "state", *axes, "learning_rate", "seed", *figures, "missing"])
    for run in runs:
        choices = run.choices or {}
        values = [f"{run.figures[name]:.10g}" if name in run.figures else "" for name in figures]
        table.writerow([run.name, run.state, *(choices.get(axis, "") for axis in axes), run.learning_rate, run.seed,
                        *values, "; ".join(run.faults)])  # fmt: skip
    return text.getvalue()
