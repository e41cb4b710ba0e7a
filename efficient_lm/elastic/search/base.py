"""What every search has: the submodels among which it looks, and the interface to score them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from efficient_lm.elastic.budget import LevelCosts, Meter
from efficient_lm.elastic.choices import units_of
from efficient_lm.elastic.nested import Nested, nested_models
from efficient_lm.elastic.switched import check_apart
from efficient_lm.errors import ConfigError
from efficient_lm.models.elastic import ElasticSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters
from efficient_lm.spec import Choice

Levels = tuple[int, ...]
"""Of each layer, which of the model's parts it has: places in `Space.nested`."""
Fitness = Literal["loss", "kl"]
Cost = Literal["params", "flops_per_token", "cache_bytes", "latency_ms"]


@dataclass(frozen=True)
class Space:
    """The submodels whose layers have parts of their own.

    Attributes:
        model: the whole.
        nested: the models whose parts layers may have, by size, the whole last.
        costs: of every part of every layer.
    """

    model: LanguageModel
    nested: tuple[Nested, ...]
    costs: LevelCosts

    @classmethod
    def of(cls, model: LanguageModel, meter: Meter) -> "Space":
        """Of a model. Raises `ConfigError` if its layers have no parts it was trained for, or must keep the same."""
        elastic = model.spec.elastic
        if elastic is None:
            raise ConfigError(
                "budget: the model was not trained to have smaller ones inside (model.elastic is null): "
                "there is nothing to choose from; name a part, ffn=0.5"
            )
        inside = {axis: grid for axis, grid in elastic.axes.items() if axis not in ("layers", "width")}
        if all(len(grid) < 2 for grid in inside.values()):
            listed = ", ".join(elastic.axes)
            raise ConfigError(
                f"search: it gives layers parts of their own, and the model is elastic along {listed}; "
                f"name a part, {next(iter(elastic.axes))}=0.5"
            )
        by_layer = model.spec.model_copy(update={"elastic": ElasticSpec(combine=elastic.combine, **inside)}).build()
        nested = sorted(nested_models(by_layer), key=lambda each: count_parameters(each.model.declarations))
        check_apart(model, nested)
        outside = meter.outside(model)
        layers = {
            name: np.array([[meter.layer(layer, model.spec.width)[name] for layer in each.model.layers]
                            for each in nested], np.float64)
            for name in meter.names
        }  # fmt: skip
        return cls(model, tuple(nested), LevelCosts(outside, layers))

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.model.layers)

    @cached_property
    def chain(self) -> tuple[int, ...]:
        """Levels of which each holds the one before along every axis, from the smallest to the whole."""
        kept: list[int] = []
        for level, each in enumerate(self.nested):
            below = self.nested[kept[-1]].parts if kept else {}
            if all(each.parts[axis] >= part for axis, part in below.items()):
                kept.append(level)
        return tuple(kept)

    def parts(self, levels: Levels) -> dict[str, list[float]]:
        """By axis, the part that each layer which has the axis keeps, as `choose` takes it."""
        sizes = units_of(self.model)
        return {
            axis: [
                self.nested[level].parts[axis]
                for level, halves in zip(levels, sizes, strict=True)
                if any(axis in half for half in halves.values())
            ]
            for axis in self.nested[-1].parts
        }


class Score(Protocol):
    """Scores submodels; less is better. A submodel that was scored before is not computed again."""

    pieces: int
    """Into how many equal pieces the rows are cut."""

    def __call__(self, levels: Levels, pieces: int | None = None) -> float:
        """On the first `pieces` of the rows; on all for None, and then the submodel is one of the search's results."""
        ...


class SearchSpec(Choice, role="search"):
    """A way to find good submodels whose layers keep different parts.

    Attributes:
        fitness: what is scored: ``loss``, cross entropy in nats per token; ``kl``, the divergence from the whole
            model's distribution of the next token to the submodel's, in nats.
        cost: against which results are compared; None: what the budget limits first, or ``params``.
    """

    fitness: Fitness = "loss"
    cost: Cost | None = None

    def run(self, space: Space, score: Score, limits: Mapping[str, float], cost: str) -> None:
        """Score submodels, the best within `limits` among them; without limits, good ones of many sizes.

        Args:
            limits: by cost; the smallest submodel meets them.
            cost: against which results are compared.
        """
        raise TypeError(f"{type(self).__name__} does not define run")


def comparable(score: float) -> float:
    """A score to rank by: what is no number is worse than any."""
    return math.inf if math.isnan(score) else score
