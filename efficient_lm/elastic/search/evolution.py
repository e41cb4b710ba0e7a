"""Evolution that raises the level of some layers and lowers that of others."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.elastic.budget import fits
from efficient_lm.elastic.search.base import Levels, Score, SearchSpec, Space, comparable
from efficient_lm.elastic.search.mix_n_match import mixes
from efficient_lm.spec import Count, Listing, Natural

SWITCHES = 3
"""Layers that one mutation raises at most."""
GROWTH = 4
"""Every step of a selection reads so many times the tokens of the one before."""


class EvolutionSpec(SearchSpec):
    """EvoPress (Sieberling et al. 2024, arXiv 2410.14649, algorithm 1): the best of a generation is the next's parent.

    Attributes:
        generations: how many there are.
        offspring: mutations of the parent in each.
        survivors: how many are left after each step of a selection, the last 1; steps read more and more tokens, and
            in the last, on all rows, the parent takes part.
        points: without a budget, how many sizes are looked at between the smallest and the whole.
        seed: of the mutations.
    """

    kind: Literal["evolution"] = "evolution"
    generations: Count = 20
    offspring: Count = 16
    survivors: Annotated[Listing[Count], Field(min_length=1)] = (4, 1)
    points: Count = 5
    seed: Natural = 0

    @model_validator(mode="after")
    def _selects(self) -> "EvolutionSpec":
        steps = (self.offspring, *self.survivors)
        if self.survivors[-1] != 1 or list(steps) != sorted(steps, reverse=True):
            said = f"survivors descend from offspring={self.offspring} or less to 1; got {list(self.survivors)}"
            raise PydanticCustomError("survivors", "{said}", {"said": said})
        return self

    def run(self, space: Space, score: Score, limits: Mapping[str, float], cost: str) -> None:
        rng = np.random.default_rng(self.seed)
        for each in [limits] if limits else self._sizes(space, cost):
            self._evolve(space, score, each, rng)

    def _sizes(self, space: Space, cost: str) -> Iterator[dict[str, float]]:
        least = space.costs.smallest[cost]
        most = space.costs.of((len(space.nested) - 1,) * space.layers)[cost]
        for size in np.linspace(least, most, self.points + 2)[1:-1]:
            yield {cost: float(size)}

    def _evolve(self, space: Space, score: Score, limits: Mapping[str, float], rng: np.random.Generator) -> None:
        parent = start(space, limits)
        if parent is None:
            return
        for _ in range(self.generations):
            children = {mutated(space, parent, limits, rng) for _ in range(self.offspring)} - {None, parent}
            # A set of tuples has no order of its own that a seed would repeat.
            parent = self._selected(sorted(children), parent, score)

    def _selected(self, children: list[Levels], parent: Levels, score: Score) -> Levels:
        steps = len(self.survivors)
        for step, count in enumerate(self.survivors, start=1):
            last = step == steps
            pieces = None if last else math.ceil(score.pieces / GROWTH ** (steps - step))
            among = [*children, parent] if last else children
            ranked = sorted(among, key=lambda levels, pieces=pieces: comparable(score(levels, pieces)))
            children = ranked[:count]
        return children[0]


def start(space: Space, limits: Mapping[str, float]) -> Levels | None:
    """The largest of Mix'n'Match's submodels that meets a budget; None if none does."""
    fitting = [levels for levels in mixes(space) if fits(space.costs.of(levels), limits)]
    return max(fitting, key=lambda levels: space.costs.of(levels)["params"], default=None)


def mutated(space: Space, levels: Levels, limits: Mapping[str, float], rng: np.random.Generator) -> Levels | None:
    """A submodel near another, and as large as a budget lets it be: some layers a level up, as many as must be down.

    None where no layer can go up.
    """
    top, found = len(space.nested) - 1, list(levels)
    for _ in range(int(rng.integers(1, SWITCHES + 1, 2).min())):
        raised = [layer for layer in range(space.layers) if found[layer] < top]
        if not raised:
            return None
        up = int(rng.choice(raised))
        found[up] += 1
        while not fits(space.costs.of(found), limits):
            lowered = [layer for layer in range(space.layers) if found[layer] > 0 and layer != up]
            if not lowered:
                return None
            found[int(rng.choice(lowered))] -= 1
    for layer in rng.permutation(space.layers):
        higher = [*found[:layer], found[layer] + 1, *found[layer + 1 :]]
        if higher[layer] <= top and fits(space.costs.of(higher), limits):
            found = higher
    return tuple(found)
