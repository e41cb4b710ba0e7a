"""The Python interface to budgets of submodels, and to searches for the best that meet one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.status import Status

from efficient_lm import terminal
from efficient_lm.api import Model
from efficient_lm.data.packing import Batch
from efficient_lm.elastic.budget import BudgetSpec, Meter, check_possible, fits
from efficient_lm.elastic.choices import granularities
from efficient_lm.elastic.importance import Order, most_important
from efficient_lm.elastic.nested import nested_models, with_granularities
from efficient_lm.elastic.search.base import SearchSpec, Space
from efficient_lm.elastic.search.mix_n_match import mixes
from efficient_lm.elastic.search.report import Row, frontier, write_report
from efficient_lm.elastic.search.scoring import Scorer
from efficient_lm.errors import ConfigError
from efficient_lm.experts import ROWS, rows_of
from efficient_lm.interop.hugging_face import SEARCH
from efficient_lm.models.elastic import MATFORMER, ElasticSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.spec import OneOf, Spec
from efficient_lm.validation import of_kind, validate


class _Search(Spec):
    search: OneOf[SearchSpec]


def within(
    model: Model,
    budget: BudgetSpec | Mapping[str, Any],
    elastic: ElasticSpec | Mapping[str, Any] | None = None,
    order: Order | None = None,
    text: str | Sequence[str] | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
) -> Model:
    """The submodel that is best by its size: the one with most parameters that meets a budget, of those that
    Mix'n'Match makes and those of one granularity.

    Args:
        budget: ``{"params": 12e6}`` (see `BudgetSpec`).
        elastic, order: of a model that was not trained to be smaller, as of `search`.
        text, sequence_length, rows: what the worth of units is measured on, as of `search`.

    Raises:
        ConfigError: the model has none inside, or none that meets the budget.
    """
    budget, whole = _budget(budget), _whole(model, elastic, order)
    meter = _meter(model, budget, None)
    candidates: list[tuple[dict[str, float], dict[str, Any]]] = []
    axes = set(whole.spec.elastic.axes) - {"layers", "width"}
    # Layers that share keys keep the same part of heads, and so do all.
    if axes and not (whole.stack.sharing and "heads" in axes):
        space = Space.of(whole, meter)
        candidates = [(space.costs.of(levels), space.parts(levels)) for levels in mixes(space)]
    candidates += [(meter.model(each.model), each.parts) for each in nested_models(whole)]
    smallest = {name: min(costs[name] for costs, _ in candidates) for name in meter.names}
    check_possible(budget.limits, smallest)
    fitting = [(costs, parts) for costs, parts in candidates if fits(costs, budget.limits)]
    if not fitting:
        raise _none_fits(budget)
    parts = max(fitting, key=lambda found: found[0]["params"])[1]
    return _in_order(model, whole, order, lambda: rows_of(model, text, sequence_length, rows)).submodel(parts)


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        rows: every submodel that was scored on all rows, by size.
        fitness: what `score` of these is.
        cost: what the frontier is against.
        chosen: the best that meets the budget; None without one.
        folder: where the report is.
        whole: the model whose parts these are, its units in the order in which they are kept.
    """

    rows: list[Row]
    fitness: str
    cost: str
    chosen: Row | None
    folder: Path
    whole: Model

    @property
    def model(self) -> Model | None:
        """The submodel that is chosen."""
        return self.chosen and self.whole.submodel(self.chosen.parts)

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
    elastic: ElasticSpec | Mapping[str, Any] | None = None,
    order: Order | None = None,
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
        elastic: granularities to choose among along axes that the model is not trained to be smaller along, ``{"ffn":
            [0.25, 0.5, 1]}``; None: those it is trained for, or with an `order` MatFormer's.
        order: what makes units of these axes worth keeping (see `efficient_lm.elastic.importance.Order`); None: how
            active they are.

    Raises:
        ConfigError: the model has no parts to choose from, or no submodel meets the budget.
        CheckpointError: the folder has results of another search.
    """
    method = of_kind(_Search, "search", method, options)
    budget = None if budget is None else _budget(budget)
    limits = {} if budget is None else budget.limits
    cost = method.cost or next(iter(limits), "params")
    definition = _whole(model, elastic, order)
    space = Space.of(definition, _meter(model, budget, cost))
    check_possible(limits, space.costs.smallest)
    batch = rows_of(model, text, sequence_length, rows)
    whole = _in_order(model, definition, order, lambda: batch)
    folder = Path(output) / SEARCH
    folder.mkdir(parents=True, exist_ok=True)
    with (
        terminal.console(stderr=True).status("") as status,
        Scorer(space, whole.params, batch, method.fitness, folder, model.dtype, _counting(status)) as scorer,
    ):
        for level in range(len(space.nested)):
            scorer((level,) * space.layers)
        method.run(space, scorer, limits, cost)
    found = frontier(space, scorer.results, cost)
    fitting = [row for row in found if fits(row.costs, limits) and np.isfinite(row.score)]
    if not fitting:
        raise _none_fits(budget) if budget else ConfigError("search: no submodel has a finite score")
    chosen = min(fitting, key=lambda row: row.score) if budget else None
    write_report(folder, found, method.fitness, cost, chosen, limits)
    return Searched(found, method.fitness, cost, chosen, folder, whole)


def _counting(status: Status) -> Callable[[int], None]:
    """Says how many submodels were computed."""
    return lambda number: status.update(f"scoring submodel {number}")


def _whole(model: Model, elastic: ElasticSpec | Mapping[str, Any] | None, order: Order | None) -> LanguageModel:
    """A model's definition, with the granularities that parts are chosen among."""
    trained = granularities(model.model)
    if elastic is None and order is None and not trained:
        raise ConfigError(
            "elastic: the model was not trained to have smaller ones inside: say among which parts to choose, "
            "elastic.ffn=[0.25,0.5,0.75,1]; order=activation by itself takes MatFormer's"
        )
    if elastic is None and trained:
        if order is not None:
            raise ConfigError(
                f"order: the model is trained so that the first of {', '.join(trained)} are the ones to keep; leave it "
                "out, or give granularities of other axes, elastic.heads=[0.5,1]"
            )
        return model.model
    if not isinstance(elastic, ElasticSpec):
        elastic = MATFORMER if elastic is None else validate(ElasticSpec, elastic, "elastic")
    for axis in ("layers", "width"):
        if axis in elastic.axes:
            raise ConfigError(f"elastic.{axis}: what is chosen are parts of layers; cut by itself, {axis}=0.5")
    return with_granularities(model.model, elastic)


def _in_order(model: Model, whole: LanguageModel, order: Order | None, rows: Callable[[], Batch]) -> Model:
    """The model, units of the axes that it is not trained along in the order in which they are kept."""
    least = {axis: grid[0] for axis, grid in granularities(whole).items() if axis not in granularities(model.model)}
    if not least:
        return model
    params, _ = most_important(model.model, model.params, least, order, rows, model.dtype)
    return Model(model.config, params, model.tokenizer, model.step, model.origin)


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
