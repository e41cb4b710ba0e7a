"""The losses of early exits: a weighted mean over exits and head, or over where a pondering token may leave."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_lm.models.exits import Exits, ExitStreams, PonderLossSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from kernels_pallas.linear_cross_entropy import CrossEntropySums

Read = Callable[[jax.Array, jax.Array], CrossEntropySums]
"""``read(hidden, weights)``: the sums of the head that reads `hidden [batch, time, width]`, by weighted tokens."""
Total = Callable[[CrossEntropySums], jax.Array]
"""What is minimised at one head."""
Losses = tuple[jax.Array, dict[str, jax.Array]]
"""The loss, and metrics by name, summed over weighted tokens: float32 scalars."""


def exit_losses(
    model: LanguageModel,
    params: Parameters,
    hidden: jax.Array,
    streams: ExitStreams,
    weights: jax.Array,
    read: Read,
    total: Total,
    at_head: CrossEntropySums,
) -> Losses:
    """The loss of a model with exits, in place of the head's alone.

    Args:
        hidden: what the head reads, ``[batch, time, width]``, and `at_head` its sums.
        weights: of tokens, float32 ``[batch, time]``.
    """
    exits, norm = model.exits, model.head(params["head"]).norm
    at_exits = [exits.normed(params, number, stream, norm) for number, stream in enumerate(streams.read)]
    if isinstance(exits.spec.loss, PonderLossSpec):
        loss, metrics = _pondered(exits, params, [*at_exits, hidden], weights, read, total)
    else:
        loss, metrics = _weighted(exits, at_exits, weights, read, total, at_head)
    if streams.targets is not None:
        distance = _distance(streams, weights)
        metrics["exit_alignment"] = distance
        loss = loss + exits.spec.stream.alignment * distance
    return loss, metrics


def _weighted(
    exits: Exits,
    at_exits: list[jax.Array],
    weights: jax.Array,
    read: Read,
    total: Total,
    at_head: CrossEntropySums,
) -> Losses:
    *shares, last = exits.spec.loss.shares(exits.places, exits.depth).tolist()
    loss, metrics = last * total(at_head), {}
    for place, share, hidden in zip(exits.places, shares, at_exits, strict=True):
        sums = read(hidden, weights)
        loss = loss + share * total(sums)
        metrics[f"exit_{place}_cross_entropy"] = sums.loss_sum
    return loss, metrics


def _pondered(
    exits: Exits, params: Parameters, hidden: list[jax.Array], weights: jax.Array, read: Read, total: Total
) -> Losses:
    """PALBERT's equations 1 to 3: ``p_i = λ_i Π_{j<i} (1 - λ_j)``, ``Σ p_i CE_i + β KL(p ‖ geometric)``."""
    logits = [exits.halting(params, number, stream) for number, stream in enumerate(hidden[:-1])]
    stayed = jnp.cumsum(jnp.stack([jnp.zeros_like(logits[0]), *map(jax.nn.log_sigmoid, map(jnp.negative, logits))]), 0)
    leaves = jnp.stack([*map(jax.nn.log_sigmoid, logits), jnp.zeros_like(logits[0])])
    log_shares = stayed + leaves
    shares = jnp.exp(log_shares)
    loss, metrics = jnp.zeros(()), {}
    for place, share, stream in zip([*exits.places, exits.depth], shares, hidden, strict=True):
        loss = loss + total(read(stream, weights * share))
        metrics[f"exit_{place}_share"] = jnp.sum(weights * share)
    prior = jnp.log(jnp.asarray(exits.spec.loss.distribution(len(exits.places)), jnp.float32))
    divergence = jnp.sum(weights * jnp.sum(shares * (log_shares - prior[:, None, None]), axis=0))
    metrics |= {"pondered_loss": loss, "ponder_divergence": divergence}
    return loss + exits.spec.loss.penalty * divergence, metrics


def _distance(streams: ExitStreams, weights: jax.Array) -> jax.Array:
    """Of accelerated streams from what they aim at, relative and squared: a mean over exits, summed over tokens."""
    read, targets = streams.read.astype(jnp.float32), jax.lax.stop_gradient(streams.targets.astype(jnp.float32))
    squares = jnp.sum((read - targets) ** 2, -1) / jnp.maximum(jnp.sum(targets**2, -1), 1e-12)
    return jnp.sum(weights * jnp.mean(squares, axis=0))
