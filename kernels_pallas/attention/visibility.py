"""Which keys a query sees: causal order, window, kept first tokens, prefix and documents, as one value."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What the masking arguments of `attention` mean, positions made explicit.

    `query_positions` [1|B, T] and `key_positions` [1|B, S] order the tokens. `key_ranks` [1|B, S] counts the tokens
    before a key in its document (for `kept`). `in_order` says that positions are the indices, so that whole blocks of
    keys can be left out before anything is computed.
    """

    causal: bool
    window: int | None
    kept: int
    query_positions: jax.Array
    key_positions: jax.Array
    key_ranks: jax.Array
    prefix_length: jax.Array | None
    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    in_order: bool

    def mask(self) -> jax.Array | None:
        """Bool [1|B, T, S], true where the query sees the key; None if every query sees every key."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        seen = None
        if self.window is not None:
            seen = query - key < self.window
            if not self.causal:
                seen &= key - query < self.window
            if self.kept:
                seen |= self.key_ranks[:, None, :] < self.kept
        if self.causal:
            seen = _and(seen, key <= query)
        if seen is not None and self.prefix_length is not None:
            seen |= key < self.prefix_length[:, None, None]
        if self.segment_ids is not None:
            same = self.segment_ids[:, :, None] == self.key_segment_ids[:, None, :]
            seen = _and(seen, same & (self.key_segment_ids[:, None, :] != 0))
        return seen


def _and(left: jax.Array | None, right: jax.Array) -> jax.Array:
    return right if left is None else left & right


def document_ranks(segment_ids: jax.Array) -> jax.Array:
    """Number of earlier tokens of the same row with the same id; int32 [B, S]."""
    order = jnp.argsort(segment_ids, axis=-1, stable=True)
    ids = jnp.take_along_axis(segment_ids, order, axis=-1)
    index = jnp.broadcast_to(jnp.arange(ids.shape[-1], dtype=jnp.int32), ids.shape)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=-1)
    ranks = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.take_along_axis(ranks, jnp.argsort(order, axis=-1), axis=-1)
