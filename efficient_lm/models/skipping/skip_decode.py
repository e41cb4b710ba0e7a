"""Fewer layers the further on in the text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec, count_fault, live
from efficient_lm.models.traversal import Runs, State, Traversal
from efficient_lm.spec import Count, Natural

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class SkipDecodeSpec(SkippingSpec):
    """The number of layers falls linearly with a token's position (SkipDecode, Del Corro et al. 2023, 2307.02628).

    The first `warmup_layers` and the last layers run, and what lies between is skipped. The layers of a token are among
    those of every token before it, so no key or state is ever missing.

    Attributes:
        most: layers of the first tokens; None takes all.
        least: layers of the last ones.
        over: positions from `most` to `least`.
        warmup_layers: first layers that always run.
        warmup_tokens: first tokens of a document that have `most`.
    """

    kind: Literal["skip_decode"] = "skip_decode"
    most: Count | None = None
    least: Count
    over: Count = 512
    warmup_layers: Natural = 1
    warmup_tokens: Natural = 0

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        depth = len(model.layers)
        most = self.most or depth
        yield from count_fault("most", most, 1, depth, f"the model has {depth} layers")
        yield from count_fault("least", self.least, 1, most, f"there are {most} at most")
        yield from count_fault("warmup_layers", self.warmup_layers, 0, self.least, f"only {self.least} layers run last")

    def budget(self, positions: jax.Array, depth: int) -> jax.Array:
        """Layers of the tokens at these positions: int32 of the same shape."""
        most = self.most or depth
        gone = jnp.clip((positions - self.warmup_tokens) / self.over, 0, 1)
        return jnp.round(most - (most - self.least) * gone).astype(jnp.int32)

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _SkipDecode(self, len(model.layers))


class _SkipDecode(Traversal):
    keeps_caches: ClassVar[bool] = False

    def __init__(self, spec: SkipDecodeSpec, depth: int):
        self.spec, self.depth = spec, depth
        self.tables = np.arange(depth, dtype=np.int32)

    def choose(self, state: State, table: jax.Array, context: Context) -> Runs:
        last = self.spec.budget(context.positions, self.depth) - self.spec.warmup_layers
        runs = ((table < self.spec.warmup_layers) | (table >= self.depth - last)) & live(context)
        return Runs(runs, runs)
