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


def documents(segment_ids: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Number the documents of every row and mark the live tokens.

    Args:
        segment_ids: int [B, T], 0 being padding, or None.

    Returns:
        int32 [B, T], never falling: how many tokens up to and including this one start from a zero state, which are
        the live ones whose id differs from that of the last live token; so 0 is the document that continues the
        initial state, and padding counts to the document before it. And bool [B, T]: the live tokens. None and None
        without ids.
    """
    if segment_ids is None:
        return None, None
    live = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(live, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = live & (before >= 0) & (segment_ids != previous)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), live


def silence(live: jax.Array | None, *values):
    """Zero [B, T, ...] values at padding, where no gradient then flows; None stays None."""
    if live is None:
        return values

    def quiet(value):
        return None if value is None else jnp.where(live.reshape(*live.shape, *(1,) * (value.ndim - 2)), value, 0)

    return tuple(quiet(value) for value in values)


def starts(document: jax.Array | None) -> jax.Array | None:
    """Bool [B, T]: the tokens that start from a zero state, from the numbers `documents` gives."""
    if document is None:
        return None
    return jnp.diff(document, axis=1, prepend=jnp.zeros_like(document[:, :1])) > 0


class Marks(NamedTuple):
    """The documents of a chunk [B, C], as `documents` numbers them, and that of the token before it [B]."""

    document: jax.Array
    before: jax.Array

    def starts(self) -> jax.Array:
        """Bool [B, C]: the token starts from a zero state."""
        return self.document != jnp.concatenate([self.before[:, None], self.document[:, :-1]], axis=1)

    def same(self) -> jax.Array:
        """Bool [B, C, C]: both tokens are of one document."""
        return self.document[:, :, None] == self.document[:, None, :]

    def entered(self) -> jax.Array:
        """Bool [B, C]: the state before the chunk reaches the token."""
        return self.document == self.before[:, None]

    def left(self) -> jax.Array:
        """Bool [B, C]: the token reaches the state after the chunk."""
        return self.document == self.document[:, -1:]

    def survives(self) -> jax.Array:
        """Bool [B]: the state before the chunk reaches the state after it."""
        return self.document[:, -1] == self.before
