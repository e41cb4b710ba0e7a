"""Mix'n'Match: submodels between two neighbouring granularities, without a search."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal

from efficient_lm.elastic.search.base import Levels, Score, SearchSpec, Space


class MixNMatchSpec(SearchSpec):
    """Parts grow with depth, by the least slope (MatFormer, Devvrit et al. 2024, section 4)."""

    kind: Literal["mix_n_match"] = "mix_n_match"

    def run(self, space: Space, score: Score, limits: Mapping[str, float], cost: str) -> None:
        for levels in mixes(space):
            score(levels)


def mixes(space: Space) -> Iterator[Levels]:
    """Every submodel whose first layers have one granularity and whose others the next; ascending, the whole last."""
    for below, above in pairwise(space.chain):
        for larger in range(space.layers):
            yield (below,) * (space.layers - larger) + (above,) * larger
    yield (space.chain[-1],) * space.layers
