"""Which proposed tokens stand, so that what comes out has the distribution of the model that verifies.

Leviathan et al. 2023, arXiv 2211.17192, section 2.3 and appendix A.1: a token x that was drawn from q stands with
probability ``min(1, p(x) / q(x))``; in place of the first that falls comes one of ``max(p - q, 0)``, normalized, and
behind the last of those that all stand one of p.
"""

import jax
import jax.numpy as jnp

from efficient_lm.inference.sampling import SamplingSpec, filter_logits

DRAFTED, STANDS, INSTEAD = range(1, 4)
"""Purposes of random numbers at one position of a row."""


def propose(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, sampling: SamplingSpec
) -> tuple[jax.Array, jax.Array]:
    """A token of each row, int32 ``[batch]``, and the float32 probabilities ``[batch, vocab]`` it was drawn from.

    Args:
        logits: ``[batch, vocab]``.
        keys: one for each row.
        positions: int32 ``[batch]``, of the tokens.
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jax.nn.one_hot(token, logits.shape[-1])
    kept = filter_logits(logits, sampling)
    draws = _keys(keys, positions[:, None], DRAFTED)[:, 0]
    return jax.vmap(jax.random.categorical)(draws, kept).astype(jnp.int32), jax.nn.softmax(kept, axis=-1)


def verify(
    logits: jax.Array,
    drafted: jax.Array,
    probabilities: jax.Array,
    offered: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    sampling: SamplingSpec,
) -> tuple[jax.Array, jax.Array]:
    """How many proposals of each row stand, int32 ``[batch]``, and the token behind them, int32 ``[batch]``.

    At temperature 0 the proposals stand that the verifier takes itself. Random numbers depend on the row's key and the
    token's position alone; those of a position are used once in what stands, for what falls with an earlier token was
    not looked at.

    Args:
        logits: of the verifier, ``[batch, k + 1, vocab]``, behind the token before the first proposal and behind each.
        drafted: int32 ``[batch, k]``.
        probabilities: that they were drawn from, float32 ``[batch, k, vocab]``.
        offered: which of them count at all, bool ``[batch, k]``.
        keys: one for each row.
        positions: int32 ``[batch, k + 1]``, of the tokens that the logits are for.
    """
    if sampling.temperature == 0:
        following = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        stands = drafted == following[:, :-1]
    else:
        wanted = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
        p, q = (
            jnp.take_along_axis(table, drafted[..., None], axis=-1)[..., 0] for table in (wanted[:, :-1], probabilities)
        )
        uniform = jax.vmap(jax.vmap(jax.random.uniform))(_keys(keys, positions[:, :-1], STANDS))
        stands = uniform * q < p
        # In place of what was not offered, as behind the last, comes what the verifier would have drawn.
        beaten = jnp.where(offered[..., None], probabilities, 0.0)
        left = jnp.maximum(wanted - jnp.pad(beaten, ((0, 0), (0, 1), (0, 0))), 0.0)
        # Where nothing is left, p and q are the same but for rounding.
        left = jnp.where(jnp.sum(left, axis=-1, keepdims=True) > 0, left, wanted)
        draws = _keys(keys, positions, INSTEAD)
        following = jax.vmap(jax.vmap(jax.random.categorical))(draws, jnp.log(left)).astype(jnp.int32)
    accepted = jnp.sum(jnp.cumprod(stands & offered, axis=1), axis=1, dtype=jnp.int32)
    return accepted, jnp.take_along_axis(following, accepted[:, None], axis=1)[:, 0]


def _keys(keys: jax.Array, positions: jax.Array, purpose: int) -> jax.Array:
    """A key for each of `positions [batch, time]` of each row."""
    at = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, purpose)))(at)
