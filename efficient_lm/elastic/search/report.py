"""What a search found: a table (JSON, CSV), a picture and a page to look around in."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_lm.elastic.budget import COSTS
from efficient_lm.elastic.search.base import Levels, Space, comparable
from efficient_lm.pages.chart import Chart, Measure, Series, drawn
from efficient_lm.pages.page import page, section
from efficient_lm.pages.palette import MUTED, Style
from efficient_lm.pages.picture import picture
from efficient_lm.pages.table import Cell, Column, Table, laid
from efficient_lm.training.reporting import write_atomically, write_json_atomically

UNITS = {
    "params": "parameters",
    "flops_per_token": "FLOPs per token",
    "cache_bytes": "bytes of caches",
    "latency_ms": "ms per token",
}
STYLES = {"scored": MUTED, "one granularity": Style(1, 1, 0), "chosen": Style(0, 3, 0)}
TABLE = "scored"
FITNESS = {"loss": "loss (nats per token)", "kl": "divergence from the whole (nats)"}


@dataclass(frozen=True)
class Row:
    """A submodel that was scored.

    Attributes:
        parts: by axis, of each layer that has it.
        costs: by name.
        score: less is better.
        uniform: whether all layers have one granularity.
        best: whether nothing that costs as much or less is as good.
    """

    parts: dict[str, list[float]]
    costs: dict[str, float]
    score: float
    uniform: bool
    best: bool

    @property
    def name(self) -> str:
        """The keys of `extract` that make it."""
        return " ".join(f"{axis}=[{','.join(f'{part:g}' for part in parts)}]" for axis, parts in self.parts.items())


def frontier(space: Space, scores: Mapping[Levels, float], cost: str) -> list[Row]:
    """A row for each submodel that was scored, by cost; submodels whose score is no number are never the best."""
    costs = {levels: space.costs.of(levels) for levels in scores}
    rows: list[Row] = []
    least = math.inf
    for levels in sorted(scores, key=lambda levels: (costs[levels][cost], comparable(scores[levels]))):
        score = scores[levels]
        best = score < least
        least = score if best else least
        rows.append(Row(space.parts(levels), costs[levels], score, len(set(levels)) == 1, best))
    return rows


def write_report(
    folder: Path, rows: Sequence[Row], fitness: str, cost: str, chosen: Row | None, limits: Mapping[str, float]
) -> None:
    """Write ``pareto.json``, ``pareto.csv``, ``pareto.png`` and ``pareto.html``."""
    costs = [name for name in COSTS if name in rows[0].costs]
    found: dict[str, Any] = {"fitness": fitness, "cost": cost, "budget": dict(limits), "submodels": []}
    for row in rows:
        figures = {name: row.costs[name] for name in costs} | {fitness: row.score}
        flags = {"best": row.best, "uniform": row.uniform, "chosen": row is chosen}
        found["submodels"].append({**figures, **flags, "parts": row.parts})
    write_json_atomically(folder / "pareto.json", found)
    write_atomically(folder / "pareto.csv", _csv(rows, costs, fitness, chosen))
    chart = _chart(rows, fitness, cost, chosen, limits)
    parts = (
        section("search", "Quality against cost", drawn(chart)),
        section("table", "Table", laid(_table(rows, fitness, chosen))),
    )
    write_atomically(folder / "pareto.html", page("Submodels", *parts))
    picture(chart, folder / "pareto.png", chart.across[0], chart.up[0])


def _csv(rows: Sequence[Row], costs: Sequence[str], fitness: str, chosen: Row | None) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*costs, fitness, "best", "uniform", "chosen", "submodel"])
    for row in rows:
        flags = [str(flag).lower() for flag in (row.best, row.uniform, row is chosen)]
        table.writerow([*(f"{row.costs[name]:.10g}" for name in costs), f"{row.score:.8g}", *flags, row.name])
    return text.getvalue()


def _chart(rows: Sequence[Row], fitness: str, cost: str, chosen: Row | None, limits: Mapping[str, float]) -> Chart:
    """Every submodel over any cost, that of the search first."""
    names = sorted((name for name in COSTS if name in rows[0].costs), key=lambda name: name != cost)
    groups = {
        "scored": [row for row in rows if not row.uniform and row is not chosen],
        "one granularity": [row for row in rows if row.uniform and row is not chosen],
        "chosen": [row for row in rows if row is chosen],
    }
    series = [
        Series(group, group, {name: [row.costs[name] for row in of] for name in names} | {
            fitness: [row.score for row in of]}, line=False, marks=True, labels=[row.name for row in of],
            rows=[f"{TABLE}-{rows.index(row)}" for row in of])
        for group, of in groups.items() if of
    ]  # fmt: skip
    caption = (
        f"{len(rows)} submodels that were scored. The dashed line goes through those that no other one of their size "
        "or smaller is as good as; a click on a submodel marks its row."
    )
    return Chart("submodels", "Submodels", caption, [Measure(name, UNITS[name]) for name in names],
                 [Measure(fitness, FITNESS[fitness])], series, STYLES, front="best of their size", limits=limits,
                 limit="budget").reduced()  # fmt: skip


def _table(rows: Sequence[Row], fitness: str, chosen: Row | None) -> Table:
    names = [name for name in COSTS if name in rows[0].costs]
    columns = [Column("submodel"), Column(fitness, True), *(Column(UNITS[name], True) for name in names), Column("")]
    cells = []
    for row in rows:
        score = row.score if math.isfinite(row.score) else None
        words = {"chosen": row is chosen, "best": row.best, "one granularity": row.uniform}
        flags = ", ".join(word for word, holds in words.items() if holds)
        cells.append([
            Cell(row.name, row.name, marked=row is chosen),
            Cell() if score is None else Cell(f"{score:.5g}", score, marked=row.best),
            *(Cell(_figure(row.costs[name]), row.costs[name]) for name in names),
            Cell(flags, flags or None),
        ])  # fmt: skip
    return Table(TABLE, f"{len(rows)} submodels; the keys of extract that make them.", columns, cells)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.5g}"
