"""What keeps the loads of experts equal, and what is seen of them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.spec import Count, Real, Spec

BUCKETS = 8
"""Stretches of a row in which dropped routes are counted."""


class BalanceSpec(Spec):
    """Losses on the routing.

    Attributes:
        load_balance: weight of ``experts * sum_e f_e p_e``, with f_e the share of routes that go to expert e and p_e
            its mean share of the scores: 1 where loads are equal (Fedus et al. 2021, eq. 4 to 6; for several experts
            per token as in DeepSeek-V3, eq. 17 to 20).
        over: tokens over which f and p are taken: all of a (micro-)batch, whatever the number of devices (``batch``);
            each of N groups of consecutive rows, as N devices would without exchange (a number, no more than rows); or
            each document (``sequence``). Several such losses are averaged by tokens.
        router_z: weight of the mean squared logsumexp of the router's outputs (Zoph et al. 2022, ST-MoE, eq. 5).
        correction_rate: what a step adds to the correction of an expert with less than the mean load, and takes from
            one with more (Wang et al. 2024, arXiv 2408.15664, algorithm 1); needs ``router.correction``.
    """

    load_balance: Real = 0.01
    over: Literal["batch", "sequence"] | Count = "batch"
    router_z: Real = 0.0
    correction_rate: Real = 0.0


def selected(routes: jax.Array, experts: int) -> jax.Array:
    """float32 ``[batch, time, experts]``: 1 where a token takes an expert."""
    return jnp.sum(routes[..., None] == jnp.arange(experts), axis=-2, dtype=jnp.float32)


def load_balance(
    spec: BalanceSpec, scores: jax.Array, taken: jax.Array, context: Context, weights: jax.Array | None = None
) -> jax.Array:
    """The loss per token, before its weight; padding counts nowhere.

    Args:
        scores: of the router, ``[batch, time, experts]``.
        taken: what `selected` says.
        weights: of each expert in the sum, ``[experts]``; None: 1.
    """
    live = (context.segment_ids != 0).astype(jnp.float32)[..., None]
    shares = scores / jnp.sum(scores, axis=-1, keepdims=True) * live
    tokens, shares, loads = (_sums(spec.over, values, context) for values in (live, shares, taken))
    routes = jnp.maximum(jnp.sum(loads, axis=-1, keepdims=True), 1.0)
    products = loads / routes * shares if weights is None else loads / routes * shares * weights
    # Divided by a part's tokens for the mean share, times these for its part in the average.
    return scores.shape[-1] * jnp.sum(products) / jnp.maximum(jnp.sum(tokens), 1.0)


def _sums(over: str | int, values: jax.Array, context: Context) -> jax.Array:
    """`values [batch, time, n]` summed over each part → ``[parts, n]``."""
    batch, time = values.shape[:2]
    if over == "sequence" and context.packed:
        starts = jnp.diff(context.segment_ids, axis=1, prepend=context.segment_ids[:, :1]) != 0
        documents = jnp.cumsum(starts, axis=1) + time * jnp.arange(batch)[:, None]
        return jax.ops.segment_sum(values.reshape(batch * time, -1), documents.reshape(-1), batch * time)
    rows = jnp.sum(values, axis=1)
    if over == "sequence":
        return rows
    parts = 1 if over == "batch" else min(over, batch)
    return jax.ops.segment_sum(rows, jnp.arange(batch) * parts // batch, parts)


def router_z(logits: jax.Array, context: Context) -> jax.Array:
    """Mean over tokens of the squared logsumexp of `logits [batch, time, experts]`."""
    return mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), context)


def mean(values: jax.Array, context: Context) -> jax.Array:
    """Of `values [batch, time]` over the tokens that are no padding."""
    live = context.segment_ids != 0
    return jnp.sum(jnp.where(live, values, 0.0)) / jnp.maximum(jnp.sum(live), 1)


def observed(scores: jax.Array, taken: jax.Array, context: Context, experts: int) -> dict[str, Any]:
    """Entropy of the router and loads of experts.

    ``router_entropy`` in nats; ``load_imbalance`` the greatest load of an expert over the mean; ``expert_load`` the
    routes to each, dropped ones too.
    """
    shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
    load = jnp.sum(taken, axis=(0, 1))
    return {
        "router_entropy": mean(jnp.sum(jax.scipy.special.entr(shares), axis=-1), context),
        "load_imbalance": jnp.max(load[:experts]) / jnp.maximum(jnp.mean(load[:experts]), 1e-9),
        "expert_load": load,
    }


def corrected(correction: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """`correction [..., experts]` after a step in which experts had this `load [..., experts]`."""
    return correction + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def drops(dropped: jax.Array, routes: jax.Array) -> dict[str, jax.Array]:
    """What is seen of `dropped`, bool ``[batch, time, k]``, among `routes` (-1 for none) of the same shape.

    ``dropped_share`` of all routes; ``dropped_by_position`` and ``routed_by_position``, dropped and all routes in each
    eighth of the rows.
    """
    time = routes.shape[1]
    eighth = jnp.arange(time) * BUCKETS // time

    def by_position(counted: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.sum(counted, axis=(0, 2), dtype=jnp.float32), eighth, BUCKETS)

    lost, all_routes = by_position(dropped), by_position(routes >= 0)
    share = jnp.sum(lost) / jnp.maximum(jnp.sum(all_routes), 1.0)
    return {"dropped_share": share, "dropped_by_position": lost, "routed_by_position": all_routes}
