"""The same few layers for every token."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec, count_fault, live
from efficient_lm.models.traversal import Runs, State, Traversal
from efficient_lm.spec import Count

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class UniformSkippingSpec(SkippingSpec):
    """So many layers run, whatever the token (Unified Layer Skipping, Liu et al. 2024, arXiv 2404.06954).

    Attributes:
        layers: how many run.
        placement: ``even``: K of L layers are ``round(i (L - 1) / (K - 1))``, the first and the last among them;
            ``contiguous``: those that do not run are one stretch in the middle.
    """

    kind: Literal["uniform"] = "uniform"
    layers: Count
    placement: Literal["even", "contiguous"] = "even"

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        depth = len(model.layers)
        yield from count_fault("layers", self.layers, 1, depth, f"the model has {depth} layers")

    def kept(self, depth: int) -> list[int]:
        """The layers that run, from 0."""
        if self.layers == 1:
            return [0]
        if self.placement == "even":
            return [round(i * (depth - 1) / (self.layers - 1)) for i in range(self.layers)]
        last = self.layers // 2
        return [*range(self.layers - last), *range(depth - last, depth)]

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _Uniform(self.kept(len(model.layers)), len(model.layers))


class _Uniform(Traversal):
    keeps_caches: ClassVar[bool] = False

    def __init__(self, kept: list[int], depth: int):
        self.tables = np.isin(np.arange(depth), kept)

    def choose(self, state: State, table: State, context: Context) -> Runs:
        runs = table & live(context)
        return Runs(runs, runs)
