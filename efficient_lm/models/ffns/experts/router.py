"""Which experts a token takes, and how much of each: always in float32."""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.ffns.expert_parallel import by_tokens
from efficient_lm.models.layers.linear import product
from efficient_lm.models.parameters import ZEROS, Initialization, parameter
from efficient_lm.spec import Count, Positive, Spec

EPSILON = 1e-20
"""Added to the sum that weights are divided by, as in DeepSeek-V3."""


class RouterSpec(Spec):
    """How tokens and experts are scored.

    Attributes:
        scores: ``softmax`` over experts (Shazeer et al. 2017), or ``sigmoid`` of each (DeepSeek-V3, Liu et al. 2024,
            eq. 15).
        normalize: whether a token's weights are divided by their sum over the experts it takes. A softmax so divided
            is the softmax over the experts taken (Mixtral). With one expert the weight is then always 1, and the
            router learns from the balance loss alone.
        scale: factor of the weights.
        bias: whether the router's linear map has a bias.
        correction: whether the choice, but not the weights, adds a bias to each expert's score that is moved outside
            the gradient (Wang et al. 2024, arXiv 2408.15664); see `balance.correction_rate`.
        groups, top_groups: experts are in `groups` of consecutive ones, and a token takes its experts from its best
            `top_groups` (DeepSeek-V2, Liu et al. 2024, section 2.1.2).
        group_score: of a group: its ``best`` score (DeepSeek-V2) or the sum of its ``best_two`` (DeepSeek-V3).
        pregated: whether scores come from the router in front of the layers (`model.pregate`).
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: Positive = 1.0
    bias: bool = False
    correction: bool = False
    groups: Count = 1
    top_groups: Count = 1
    group_score: Literal["best", "best_two"] = "best_two"
    pregated: bool = False

    def faults(self, experts: int, top_k: int) -> Iterator[tuple[str, str]]:
        """What cannot work with so many experts: pairs of (key, message)."""
        if experts % self.groups:
            valid = max(size for size in range(1, self.groups) if experts % size == 0)
            yield "groups", f"{self.groups} groups do not divide {experts} experts; nearest valid: {valid}"
            return
        size = experts // self.groups
        if self.top_groups > self.groups:
            yield "top_groups", f"{self.top_groups}, but there are {self.groups} groups; at most {self.groups}"
        elif top_k > self.top_groups * size:
            least, held = -(-top_k // size), f"{self.top_groups} groups of {size} experts"
            valid = f"at least {least}" if least <= self.groups else "take fewer groups"
            yield "top_groups", f"{held} hold fewer than top_k={top_k}; {valid}"
        if self.groups > 1 and size < 2 and self.group_score == "best_two":
            yield "group_score", "groups of one expert have no second best; take 'best'"
        if self.pregated and self.bias:
            yield "bias", "scores of the router in front of the layers take none; false is the only value"


class Router(nnx.Module):
    def __init__(self, spec: RouterSpec, width: int, experts: int, init: Initialization):
        axes = {"embed": width, "experts": experts}
        self.spec = spec
        self.weight = None if spec.pregated else parameter(axes, init.matrix(width), decay=True, matrix=((0,), (1,)))
        self.bias = parameter({"experts": experts}, ZEROS) if spec.bias else None
        self.correction = parameter({"experts": experts}, ZEROS) if spec.correction else None

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`x [batch, time, width]` → float32 ``[batch, time, experts]``, before softmax or sigmoid."""
        if self.weight is None:
            return context.pregated.astype(jnp.float32)
        with jax.default_matmul_precision("float32"):
            logits = product(x.astype(jnp.float32), self.weight[...], ("embed", "experts"), 1)
        return logits if self.bias is None else logits + self.bias[...]

    def scores(self, logits: jax.Array) -> jax.Array:
        """float32, same shape, from 0 to 1."""
        return jax.nn.softmax(logits) if self.spec.scores == "softmax" else jax.nn.sigmoid(logits)

    def choice(self, scores: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
        """`scores [batch, time, experts]` → each token's experts, int32, and their weights, ``[batch, time, k]``."""
        ranking = jax.lax.stop_gradient(scores)
        if self.correction is not None:
            ranking = ranking + jax.lax.stop_gradient(self.correction[...])
        routes = by_tokens(partial(self._best, top_k), ranking)
        return routes, self.weighed(jnp.take_along_axis(scores, routes, axis=-1))

    def weighed(self, taken: jax.Array) -> jax.Array:
        """The weights of experts taken with these scores, ``[..., k]``."""
        if self.spec.normalize:
            taken = taken / (jnp.sum(taken, axis=-1, keepdims=True) + EPSILON)
        return taken * self.spec.scale

    def _best(self, top_k: int, ranking: jax.Array) -> jax.Array:
        ranking = self._of_best_groups(ranking) if self.spec.groups > 1 else ranking
        return jax.lax.top_k(ranking, top_k)[1].astype(jnp.int32)

    def _of_best_groups(self, ranking: jax.Array) -> jax.Array:
        """Without the experts of other groups."""
        grouped = ranking.reshape(*ranking.shape[:-1], self.spec.groups, -1)
        best = jax.lax.top_k(grouped, 1 if self.spec.group_score == "best" else 2)[0].sum(-1)
        groups = jax.lax.top_k(best, self.spec.top_groups)[1]
        kept = (groups[..., None] == jnp.arange(self.spec.groups)).any(-2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranking.shape)
