"""Dynamic programming over what each layer's parts cost and how much they are missed."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from efficient_lm.elastic.search.base import Levels, Score, SearchSpec, Space
from efficient_lm.spec import Count

STATES = 4096
"""Partial solutions that are kept at most; with fewer the result is exact."""


class DynamicProgrammingSpec(SearchSpec):
    """Layers are cut one at a time, and what that costs is taken to add up: a knapsack with a choice for each layer.

    Attributes:
        points: submodels of the solution's frontier that are scored.
    """

    kind: Literal["dynamic_programming"] = "dynamic_programming"
    points: Count = 16

    def run(self, space: Space, score: Score, limits: Mapping[str, float], cost: str) -> None:
        harm, names = sensitivity(space, score), tuple(limits) or (cost,)
        room = np.array([limits.get(name, np.inf) - space.costs.outside[name] for name in names])
        costs = np.stack([space.costs.layers[name] for name in names], axis=-1)
        found = knapsack(costs, harm, room)
        for place in sorted({round(place) for place in np.linspace(0, len(found) - 1, min(self.points, len(found)))}):
            score(found[place])


def sensitivity(space: Space, score: Score) -> np.ndarray:
    """How much worse the model is when one layer alone has a level, float64 ``[levels, layers]``.

    What cannot be computed, for a part whose scores are no numbers, is infinitely bad.
    """
    whole = (len(space.nested) - 1,) * space.layers
    harm = np.zeros((len(space.nested), space.layers))
    for layer in range(space.layers):
        for level in range(len(space.nested) - 1):
            harm[level, layer] = score((*whole[:layer], level, *whole[layer + 1 :])) - score(whole)
    return np.where(np.isnan(harm), np.inf, harm)


def knapsack(costs: np.ndarray, harm: np.ndarray, room: np.ndarray) -> list[Levels]:
    """Every choice of a level for each layer such that none costs less and does less harm, the most harmful first.

    Args:
        costs: float64 ``[levels, layers, costs]``.
        harm: float64 ``[levels, layers]``; that of a choice is the sum.
        room: what a choice may cost at most, float64 ``[costs]``.
    """
    levels, layers = harm.shape
    rest = costs.min(axis=0)[::-1].cumsum(axis=0)[::-1]
    spent, harmed = np.zeros((1, costs.shape[-1])), np.zeros(1)
    taken = np.zeros((1, 0), np.int64)
    for layer in range(layers):
        spent = (spent[:, None] + costs[None, :, layer]).reshape(-1, costs.shape[-1])
        harmed = (harmed[:, None] + harm[None, :, layer]).reshape(-1)
        taken = np.concatenate([np.repeat(taken, levels, axis=0), np.tile(np.arange(levels), len(taken))[:, None]], 1)
        later = rest[layer + 1] if layer + 1 < layers else 0.0
        # Sums in another order differ in their last digit.
        possible = np.flatnonzero(np.all(spent + later <= room * (1 + 1e-12), axis=1))
        kept = possible[_undominated(spent[possible], harmed[possible])]
        if len(kept) > STATES:
            kept = kept[np.linspace(0, len(kept) - 1, STATES).round().astype(int)]
        spent, harmed, taken = spent[kept], harmed[kept], taken[kept]
    return [tuple(row) for row in taken[np.argsort(-harmed, kind="stable")].tolist()]


def _undominated(spent: np.ndarray, harmed: np.ndarray) -> Sequence[int]:
    """The choices that none does better than, by their first cost; of equal ones the first."""
    order = np.lexsort((harmed, *spent.T[::-1]))
    if spent.shape[1] == 1:
        before = np.minimum.accumulate(np.concatenate([[np.inf], harmed[order][:-1]]))
        return order[(harmed[order] < before) | (np.arange(len(order)) == 0)]
    kept: list[int] = []
    figures = np.column_stack([spent, harmed])
    for place in order:
        if not np.any(np.all(figures[kept] <= figures[place], axis=1)):
            kept.append(int(place))
    return np.array(kept, np.int64)
