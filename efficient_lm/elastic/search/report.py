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
from efficient_lm.elastic.search.page import page
from efficient_lm.training.reporting import empty_plot, save_plot, write_atomically, write_json_atomically

UNITS = {
    "params": "parameters",
    "flops_per_token": "FLOPs per token",
    "cache_bytes": "bytes of caches",
    "latency_ms": "ms per token",
}
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
    labels = {"costs": {name: UNITS[name] for name in costs}, "fitness": FITNESS[fitness]}
    write_atomically(folder / "pareto.html", page(found, labels, [row.name for row in rows]))
    _plot(folder / "pareto.png", rows, fitness, cost, chosen, limits)


def _csv(rows: Sequence[Row], costs: Sequence[str], fitness: str, chosen: Row | None) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*costs, fitness, "best", "uniform", "chosen", "submodel"])
    for row in rows:
        flags = [str(flag).lower() for flag in (row.best, row.uniform, row is chosen)]
        table.writerow([*(f"{row.costs[name]:.10g}" for name in costs), f"{row.score:.8g}", *flags, row.name])
    return text.getvalue()


def _plot(
    path: Path, rows: Sequence[Row], fitness: str, cost: str, chosen: Row | None, limits: Mapping[str, float]
) -> None:
    axes = empty_plot(UNITS[cost], FITNESS[fitness], "submodels")

    def points(of: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [row.costs[cost] for row in of], [row.score for row in of]

    best, uniform = [row for row in rows if row.best], [row for row in rows if row.uniform]
    axes.plot(*points(rows), "o", color="#999999", markersize=3, alpha=0.5, label="scored")
    axes.plot(*points(best), "-o", color="#4c72b0", markersize=4, linewidth=1.5, label="best of their size")
    axes.plot(*points(uniform), "s", color="#dd8452", markersize=7, fillstyle="none", label="one granularity")
    if chosen is not None:
        axes.plot(*points([chosen]), "*", color="#c44e52", markersize=14, label="chosen")
    if cost in limits:
        axes.axvline(limits[cost], color="#c44e52", linewidth=1, linestyle="--", label="budget")
    axes.legend(frameon=False)
    save_plot(axes, path)
