"""Rows cut into chunks of 64 tokens, and widths rounded up to whole tiles."""

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
