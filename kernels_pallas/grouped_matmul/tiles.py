"""Rows in groups as tiles of one group each, a list of static length that is made where the sizes are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Of each tile, int32 [L]: its first row, first row and first row behind of its group, and the group.

    `count` int32 [] tiles are there; what the lists hold behind them means nothing.
    """

    rows: jax.Array
    starts: jax.Array
    ends: jax.Array
    groups: jax.Array
    count: jax.Array


def tiles(size: int, rows: int, group_sizes: jax.Array, *, alignment: int = 1, every: bool = False) -> Tiles:
    """Tiles of `size` rows that cover the groups, in order; groups end where the rows do.

    Args:
        alignment: of the rows that tiles begin at, a divisor of `size`. Above 1, the first tile of a group may begin
            before its group.
        every: an empty group has a tile as well.
    """
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    origins = starts // alignment * alignment
    needed = jnp.where(ends > starts, -((origins - ends) // size), int(every))
    behind = jnp.cumsum(needed)
    index = jnp.arange(-(-rows // size) + (2 if every or alignment > 1 else 1) * len(ends), dtype=jnp.int32)
    groups = jnp.minimum(jnp.searchsorted(behind, index, side="right"), len(ends) - 1).astype(jnp.int32)
    within = index - (behind - needed)[groups]
    return Tiles(origins[groups] + within * size, starts[groups], ends[groups], groups, behind[-1])


def with_rest(rows: int, group_sizes: jax.Array) -> jax.Array:
    """The sizes [E + 1], the last one that of the rows of no group."""
    sizes = group_sizes.astype(jnp.int32)
    return jnp.append(sizes, jnp.maximum(rows - jnp.sum(sizes), 0))
