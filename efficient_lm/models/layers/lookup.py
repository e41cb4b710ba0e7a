"""Rows of a table by number, on one device or where devices divide the table."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas.partition import COPIES, divided, home_of, manual, several


def lookup(table: jax.Array, numbers: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """``table[numbers]`` of `table [vocab, embed]` and int32 `numbers [batch, time]` → ``[batch, time, embed]``.

    Where devices divide the channels, each looks up its own for the rows of all, and what was looked up travels: less
    than the table, whose gradient then needs no exchange. Where they divide the vocabulary, sums over them are taken.
    """
    if not several():
        return table[numbers].astype(dtype)
    rows, times = (divided(kind, [size]) for kind, size in zip(("batch", "time"), numbers.shape, strict=True))
    vocabulary, channels = home_of(("vocab", "embed"), table.shape)
    vocabulary = None if vocabulary in COPIES else vocabulary
    travels = channels in rows

    def own(table: jax.Array, numbers: jax.Array) -> jax.Array:
        numbers = jax.lax.all_gather(numbers, channels, axis=0, tiled=True) if travels else numbers
        if vocabulary is None:
            y = table[numbers].astype(dtype)
        else:
            here = numbers - jax.lax.axis_index(vocabulary) * len(table)
            mine = (here >= 0) & (here < len(table))
            y = jnp.where(mine[..., None], table[jnp.where(mine, here, 0)], 0).astype(dtype)
            y = jax.lax.psum(y, vocabulary)
        if travels:
            return jax.lax.all_to_all(y, channels, split_axis=0, concat_axis=2, tiled=True)
        return y if channels is None else jax.lax.all_gather(y, channels, axis=2, tiled=True)

    spread = P(rows or None, times or None)
    return manual(own, (P(vocabulary, channels), spread), spread)(table, numbers)
