"""A router per layer reads how a document begins, and decides whether the rest of it runs the layer."""

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.depth.base import DepthSpec, Run, run_if_any
from efficient_lm.models.layers.norms import RMSNormSpec
from efficient_lm.models.mixers.base import Cache
from efficient_lm.models.parameters import ZEROS, Constant, Initialization, parameter
from efficient_lm.spec import Count, Fraction, Real

AT_FIRST = 2.0
"""Logit that routers begin with: nearly nine parts of ten of every layer."""


class RouterSkipSpec(DepthSpec):
    """Layers chosen by the prompt (FiRST, Jain et al. 2025, arXiv 2410.12513).

    The first tokens of every document run the block, and the mean over them of ``w · norm(x) + b``, through a sigmoid,
    is the probability p of all later ones to run it. In training a later token gets that share of what the block adds;
    afterwards it runs the block where p is above the threshold. A whole document decides alike, so no key or state that
    a token needs is ever missing, and whoever decodes knows the decision once the first tokens have been read.

    Attributes:
        tokens: how many of a document decide.
        threshold: of p.
        skip_loss: weight of p, the cost of running: what makes a router skip.
        undecided_loss: weight of ``4 p (1 - p)``, of being neither run nor skipped, which inference does not know.
    """

    kind: Literal["router_skip"] = "router_skip"
    tokens: Count = 16
    threshold: Fraction = 0.5
    skip_loss: Annotated[Real, Field(ge=0)] = 0.01
    undecided_loss: Annotated[Real, Field(ge=0)] = 0.01

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return RouterSkip(self, width)

    def flops_per_token(self, width: int, block: Callable[[float], float], context_length: float) -> float:
        return block(context_length) + 2.0 * width * min(1.0, self.tokens / context_length)


class RouterSkip(nnx.Module):
    def __init__(self, spec: RouterSkipSpec, width: int):
        self.spec = spec
        self.norm = RMSNormSpec(scale=False).build(width)
        self.weight = parameter({"embed": width}, ZEROS, sums=(0,))
        self.bias = parameter({}, Constant(AT_FIRST))

    def __call__(
        self, run: Run, x: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, Auxiliary]:
        """`x [batch, time, width]` → the same; observed: `depth_share`, of real tokens that run; `ran` if asked for."""
        real = context.segment_ids != 0
        first = real & (context.positions < self.spec.tokens)
        logits, cache_sums = self._decisions(x, context, first, cache)
        share = jnp.where(first, 1.0, jax.nn.sigmoid(logits))
        runs = real & (first | (share > self.spec.threshold))
        block_cache = None if cache is None else cache["block"]
        if context.key is None:
            y, block_cache, auxiliary = run_if_any(run, x, context, block_cache, jnp.any(runs))
            y = jnp.where(runs[..., None], y, x)
        else:
            y, block_cache, auxiliary = run(x, context, block_cache)
            y = (x + share[..., None] * (y.astype(jnp.float32) - x)).astype(x.dtype)
        auxiliary = auxiliary.merged(self._auxiliary(share, runs, real, real & ~first))
        if context.record:
            auxiliary.observed["ran"] = runs
        return y, None if cache is None else {"block": block_cache, **cache_sums}, auxiliary

    def _decisions(
        self, x: jax.Array, context: Context, first: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache]:
        """float32 ``[batch, time]``: each one's mean score of the first tokens of its document; sums for a cache."""
        scores = self.norm(x.astype(jnp.float32)) @ self.weight[...] + self.bias[...]
        begins = (context.segment_ids != 0) & (context.positions == 0)
        earlier = {"score": jnp.zeros(x.shape[0]), "count": jnp.zeros(x.shape[0])} if cache is None else cache
        sums = {
            "score": _since(begins, jnp.where(first, scores, 0.0), earlier["score"]),
            "count": _since(begins, first.astype(jnp.float32), earlier["count"]),
        }
        # Tokens whose document's beginning is nowhere to be seen count as if the router had just begun.
        found = sums["count"] > 0
        logits = jnp.where(found, sums["score"] / jnp.maximum(sums["count"], 1.0), AT_FIRST)
        return logits, {name: values[:, -1] for name, values in sums.items()}

    def _auxiliary(self, share: jax.Array, runs: jax.Array, real: jax.Array, later: jax.Array) -> Auxiliary:
        costs = {
            "router_skip": self.spec.skip_loss * _mean(share, later),
            "router_undecided": self.spec.undecided_loss * _mean(4 * share * (1 - share), later),
        }
        return Auxiliary(costs, {"depth_share": _mean(runs, real)})

    def init_cache(
        self, empty: Callable[..., Cache | None], batch: int, length: int, dtype: jax.typing.DTypeLike
    ) -> Cache:
        """The block's own, and the sums that the decision is made of."""
        zeros = jnp.zeros((batch,), jnp.float32)
        return {"block": empty(batch, length, dtype), "score": zeros, "count": zeros}


def _since(begins: jax.Array, values: jax.Array, earlier: jax.Array) -> jax.Array:
    """Sums of `values [batch, time]` from where their document begins; from `earlier [batch]` on if before the row."""
    sums, index = jnp.cumsum(values, axis=1), jnp.arange(values.shape[1])
    start = jax.lax.cummax(jnp.where(begins, index, -1), axis=1)
    before = jnp.take_along_axis(sums - values, jnp.maximum(start, 0), axis=1)
    return jnp.where(start >= 0, sums - before, sums + earlier[:, None])


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)
