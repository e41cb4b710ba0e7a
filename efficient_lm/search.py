"""The Python interface to budgets of submodels, and to searches for the best that meet one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from efficient_lm.api import Model
from efficient_lm.elastic.budget import BudgetSpec, Meter, check_possible, fits
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.search.base import SearchSpec, Space
from efficient_lm.elastic.search.mix_n_match import mixes
from efficient_lm.elastic.search.report import Row, frontier, write_report
from efficient_lm.elastic.search.scoring import Scorer
from efficient_lm.errors import ConfigError
from efficient_lm.experts import ROWS, rows_of
from efficient_lm.interop.hugging_face import SEARCH
from efficient_lm.spec import OneOf, Spec
from efficient_lm.validation import validate


class _Search(Spec):
    search: OneOf[SearchSpec]


def within(model: Model, budget: BudgetSpec | Mapping[str, Any]) -> Model:
    """The submodel that is best by its size: the one with most parameters that meets a budget, of those that
    Mix'n'Match makes and those of one granularity.

    Args:
        budget: ``{"params": 12e6}`` (see `BudgetSpec`).

    Raises:
        ConfigError: the model has none inside, or none that meets the budget.
    """
    budget = _budget(budget)
    meter, whole = _meter(model, budget, None), model.model
    candidates: list[tuple[dict[str, float], dict[str, Any]]] = []
    if whole.spec.elastic is None or not set(whole.spec.elastic.axes) <= {"layers", "width"}:
        space = Space.of(whole, meter)
        candidates = [(space.costs.of(levels), space.parts(levels)) for levels in mixes(space)]
    candidates += [(meter.model(each.model), each.parts) for each in nested_models(whole)]
    smallest = {name: min(costs[name] for costs, _ in candidates) for name in meter.names}
    check_possible(budget.limits, smallest)
    fitting = [(costs, parts) for costs, parts in candidates if fits(costs, budget.limits)]
    if not fitting:
        raise _none_fits(budget)
    return model.submodel(max(fitting, key=lambda found: found[0]["params"])[1])


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        rows: every submodel that was scored on all rows, by size.
        fitness: what `score` of these is.
        cost: what the frontier is against.
        chosen: the best that meets the budget; None without one.
        folder: where the report is.
    """

    rows: list[Row]
    fitness: str
    cost: str
    chosen: Row | None
    folder: Path

    def __str__(self) -> str:
        best = sum(row.best for row in self.rows)
        lines = [f"{len(self.rows)} submodels scored, {best} of them the best of their {self.cost} → {self.folder}"]
        for row in (row for row in self.rows if row.best):
            lines.append(f"  {row.costs[self.cost]:>14,.6g}  {self.fitness} {row.score:.4f}  {row.name}")
        return "\n".join(lines)


def search(
    model: Model,
    method: str | SearchSpec,
    output: str | Path,
    budget: BudgetSpec | Mapping[str, Any] | None = None,
    text: str | Sequence[str] | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
    **options: Any,
) -> Searched:
    """Look for good submodels, and write what was found to the folder ``search`` of `output`.

    A search that was stopped goes on there; what was scored is not scored again.

    Args:
        method: its kind, with its attributes as `options`: ``search(model, "evolution", ..., generations=20)``; or the
            whole search.
        budget: what the submodel may cost; None looks for good ones of all sizes.
        text: calibration files; None takes the validation part of what the model was trained on.
        sequence_length: tokens of a row of these; None takes that of training.
        rows: at most so many.

    Raises:
        ConfigError: the model has no parts to choose from, or no submodel meets the budget.
        CheckpointError: the folder has results of another search.
    """
    if isinstance(method, str):
        method = validate(_Search, {"search": {"kind": method, **options}}).search
    budget = None if budget is None else _budget(budget)
    limits = {} if budget is None else budget.limits
    cost = method.cost or next(iter(limits), "params")
    meter = _meter(model, budget, cost)
    space = Space.of(model.model, meter)
    check_possible(limits, space.costs.smallest)
    batch = rows_of(model, text, sequence_length, rows)
    folder = Path(output) / SEARCH
    folder.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:

        def begun(number: int) -> None:
            status.update(f"scoring submodel {number}")

        scorer = Scorer(space, model.params, batch, method.fitness, folder, model.dtype, begun)
        try:
            for level in range(len(space.nested)):
                scorer((level,) * space.layers)
            method.run(space, scorer, limits, cost)
        finally:
            scorer.close()
    found = frontier(space, scorer.results, cost)
    fitting = [row for row in found if fits(row.costs, limits) and np.isfinite(row.score)]
    if not fitting:
        raise _none_fits(budget) if budget else ConfigError("search: no submodel has a finite score")
    chosen = min(fitting, key=lambda row: row.score) if budget else None
    write_report(folder, found, method.fitness, cost, chosen, limits)
    return Searched(found, method.fitness, cost, chosen, folder)


def _budget(budget: BudgetSpec | Mapping[str, Any]) -> BudgetSpec:
    return budget if isinstance(budget, BudgetSpec) else validate(BudgetSpec, budget, "budget")


def _none_fits(budget: BudgetSpec) -> ConfigError:
    return ConfigError(f"budget: there is no submodel that meets {' and '.join(budget.limits)} together; raise one")


def _meter(model: Model, budget: BudgetSpec | None, cost: str | None) -> Meter:
    limits = {} if budget is None else budget.limits
    length = (budget and budget.length) or model.config.train.sequence_length
    model.model.check_length(length, "budget.length")
    latency = "latency_ms" in limits or cost == "latency_ms"
    if latency or "cache_bytes" in limits:
        model.config.model.check_decodes()
    return Meter(length, model.dtype, latency)
