"""Around the kernels: rows in chunks of 64 tokens, widths rounded up to whole tiles, heads summed over groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.segments import Documents

TILE = 64
"""Columns of a tile of bfloat16: 128 bytes."""


def filled(value: jax.Array | None, mode: str = "constant"):
    """[B, T, ...] with T made a multiple of 64, by zeros or, with mode "edge", the last entry; None stays None."""
    missing = 0 if value is None else -value.shape[1] % CHUNK
    return value if missing == 0 else jnp.pad(value, [(0, 0), (0, missing)] + [(0, 0)] * (value.ndim - 2), mode=mode)


def widened(q, k, v, state):
    """q, k [..., K], v [..., V] and state [..., K, V] with zeros up to multiples of 64."""
    more_keys, more_values = -q.shape[-1] % TILE, -v.shape[-1] % TILE

    def pad(value, *more):
        widths = [(0, 0)] * (value.ndim - len(more)) + [(0, extra) for extra in more]
        return jnp.pad(value, widths) if any(more) else value

    return pad(q, more_keys), pad(k, more_keys), pad(v, more_values), pad(state, more_keys, more_values)


class Chunked(NamedTuple):
    """The documents of rows in chunks: their numbers [B, N, C], and the number in front of each chunk [B, N]."""

    number: jax.Array
    before: jax.Array

    @staticmethod
    def of(documents: Documents) -> "Chunked":
        """The last chunk's missing tokens belong to the last document."""
        number = filled(documents.number, "edge")
        number = number.reshape(number.shape[0], -1, CHUNK)
        return Chunked(number, jnp.pad(number[:, :-1, -1], ((0, 0), (1, 0))))

    def same(self) -> jax.Array:
        """Bool [B, N, C, C]: both tokens are of one document."""
        return self.number[..., :, None] == self.number[..., None, :]

    def entered(self) -> jax.Array:
        """Bool [B, N, C]: the state in front of the chunk reaches the token."""
        return self.number == self.before[..., None]

    def left(self) -> jax.Array:
        """Bool [B, N, C]: the token reaches the state after the chunk."""
        return self.number == self.number[..., -1:]

    def survives(self) -> jax.Array:
        """Bool [B, N]: the state in front of the chunk reaches the state after it."""
        return self.number[..., -1] == self.before


def decay_of_chunks(log_decay: jax.Array, documents: Chunked | None) -> jax.Array:
    """The decay of a state over every chunk, float32 [B, N, H, K], of [B, T, H, K]; 0 where it does not survive."""
    batch, time, *channels = log_decay.shape
    whole = jnp.exp(jnp.sum(log_decay.reshape(batch, time // CHUNK, CHUNK, *channels), axis=2))
    return whole if documents is None else jnp.where(documents.survives()[:, :, None, None], whole, 0)


def over_group(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """[B, T, H, K] summed over the heads of each group, in float32, as an array [B, T, G, K]."""
    batch, time, groups, width = like.shape
    if groups == gradient.shape[2]:
        return gradient
    split = gradient.reshape(batch, time, groups, -1, width)
    return jnp.sum(split, axis=3, dtype=jnp.float32).astype(like.dtype)
