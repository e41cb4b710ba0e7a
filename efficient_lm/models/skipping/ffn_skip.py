"""Channel mixers are skipped where they change little; mixers and their caches always run."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec, cosine, count_fault, live
from efficient_lm.models.traversal import Passage, Runs, Traversal
from efficient_lm.spec import Count, Natural, Real

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class FFNSkippingSpec(SkippingSpec):
    """A token whose stream an ffn hardly changes skips the next ones (FFN-SkipLLM, Jaiswal et al. 2024, 2404.03865).

    Attributes:
        threshold: of the cosine between the streams in front of an ffn and behind it, above which they are alike.
        skip: so many of the ffns that follow are skipped, before the next one is looked at; None skips all of them.
        first, last: layers whose ffns always run, and are not looked at.
        warmup_tokens: first tokens of a document that run everything.
    """

    kind: Literal["ffn_skip"] = "ffn_skip"
    threshold: Annotated[Real, Field(ge=-1, le=1)] = 0.95
    skip: Count | None = None
    first: Natural = 1
    last: Natural = 1
    warmup_tokens: Natural = 0

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        depth = len(model.layers)
        if not any(layer.ffn for layer in model.layers):
            yield "kind", "'ffn_skip' skips ffns, and no block has one; choose another policy, such as uniform"
        yield from count_fault("first", self.first, 0, depth - 1, f"the model has {depth} layers")
        most = depth - 1 - self.first
        yield from count_fault("last", self.last, 0, most, f"{depth - self.first} layers are left behind the first")

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _FFNSkipping(self, np.array([layer.ffn is not None for layer in model.layers]))


class _FFNSkipping(Traversal):
    keeps_caches: ClassVar[bool] = False

    def __init__(self, spec: FFNSkippingSpec, has_ffn: np.ndarray):
        depth = len(has_ffn)
        layers = np.arange(depth)
        self.spec, self.skip = spec, spec.skip or depth
        # Whether a layer's ffn may be skipped.
        self.tables = has_ffn & (layers >= spec.first) & (layers < depth - spec.last)

    def start(self, x: jax.Array) -> jax.Array:
        """How many of the next ffns each token still skips: int32 ``[batch, time]``."""
        return jnp.zeros(x.shape[:2], jnp.int32)

    def choose(self, state: jax.Array, table: jax.Array, context: Context) -> Runs:
        warm = context.positions < self.spec.warmup_tokens
        return Runs(live(context), live(context) & ~(table & (state > 0) & ~warm))

    def watch(
        self, state: jax.Array, table: jax.Array, passage: Passage, runs: Runs | None, context: Context
    ) -> jax.Array:
        alike = cosine(passage.between, passage.after) > self.spec.threshold
        after = jnp.where(runs.ffn, jnp.where(alike, self.skip, 0), state - 1)
        return jnp.where(table, after, state)
