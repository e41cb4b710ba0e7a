"""Packed documents in recurrent operators: where a state starts from zero, and which tokens are padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def check_segments(op: str, segment_ids, batch: int, time: int) -> None:
    """Refuse ids of another shape or dtype and, where the values can be seen, ids that go back and forth.

    Raises:
        ValueError: naming the operator and the row.
    """
    if segment_ids is None:
        return
    if segment_ids.shape != (batch, time):
        raise ValueError(f"{op}: segment_ids must have shape {(batch, time)}, not {segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{op}: segment_ids must be integers, not {segment_ids.dtype}")
    if isinstance(segment_ids, jax.core.Tracer) or not getattr(segment_ids, "is_fully_addressable", True):
        return
    for row, ids in enumerate(np.asarray(segment_ids)):
        ids = ids[ids != 0]
        runs = ids[np.flatnonzero(np.diff(ids, prepend=0))]
        kinds, counts = np.unique(runs, return_counts=True)
        if np.any(counts > 1):
            again = kinds[counts > 1][0]
            raise ValueError(f"{op}: segment_ids of row {row} go back and forth: {again} returns after another")


class Documents(NamedTuple):
    """The documents of packed rows."""

    number: jax.Array
    """int32 [B, T], never falling: how many tokens up to and including this one start from a zero state. 0 is the
    document that continues the initial state; padding counts to the document before it."""

    live: jax.Array
    """bool [B, T]: the tokens that are no padding."""

    def starts(self) -> jax.Array:
        """Bool [B, T]: the tokens that start from a zero state."""
        return jnp.diff(self.number, axis=1, prepend=jnp.zeros_like(self.number[:, :1])) > 0


def documents(segment_ids: jax.Array | None) -> Documents | None:
    """Number the documents of int [B, T] ids, 0 being padding; None without ids.

    A token starts from a zero state if it is live and its id differs from that of the last live token of its row.
    """
    if segment_ids is None:
        return None
    live = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(live, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = live & (before >= 0) & (segment_ids != previous)
    return Documents(jnp.cumsum(starts, axis=1, dtype=jnp.int32), live)


@jax.custom_vjp
def _silent(live, value):
    return jnp.where(live.reshape(*live.shape, *(1,) * (value.ndim - 2)), value, 0)


# The mask alone is kept, where jnp.where would keep it broadcast, and zeros besides.
_silent.defvjp(lambda live, value: (_silent(live, value), live), lambda live, change: (None, _silent(live, change)))


def silence(documents, value):
    """Zero [B, T, ...] values at padding, where no gradient then flows, whatever they hold.

    `documents` is anything with `live` [B, T], or None for no padding; a value of None stays None.
    """
    return value if documents is None or value is None else _silent(documents.live, value)


class Marks(NamedTuple):
    """The documents of a chunk: their numbers and the live tokens [B, C], and the number before the chunk [B]."""

    number: jax.Array
    live: jax.Array
    before: jax.Array

    def starts(self) -> jax.Array:
        """Bool [B, C]: the token starts from a zero state."""
        return self.number != jnp.concatenate([self.before[:, None], self.number[:, :-1]], axis=1)

    def same(self) -> jax.Array:
        """Bool [B, C, C]: both tokens are of one document."""
        return self.number[:, :, None] == self.number[:, None, :]

    def entered(self) -> jax.Array:
        """Bool [B, C]: the state before the chunk reaches the token."""
        return self.number == self.before[:, None]

    def left(self) -> jax.Array:
        """Bool [B, C]: the token reaches the state after the chunk."""
        return self.number == self.number[:, -1:]

    def survives(self) -> jax.Array:
        """Bool [B]: the state before the chunk reaches the state after it."""
        return self.number[:, -1] == self.before
