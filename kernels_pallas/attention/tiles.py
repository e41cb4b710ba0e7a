"""Which tiles of the logits a kernel visits: rectangles of queries by keys that some, or all, of their pairs see."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Visibility

RUN = ("first", "count", "next_first", "next_count", "full_first", "full_end")
"""A row of `runs`: two stretches of tiles to visit, and a stretch of them in which no pair is hidden."""


def tiles(visibility: Visibility, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Bool [1|B, T / queries, S / keys], rounded up: some pair of the tile may see each other; every pair does.

    Documents are compared by the least and the largest of their ids, so a tile may be visited in vain.
    """
    low, high = (x[:, :, None] for x in _bounds(visibility.query_positions, queries))
    least, most = (x[:, None] for x in _bounds(visibility.key_positions, keys))
    some = whole = jnp.ones_like(low <= least)
    if visibility.window is not None:
        some, whole = low - most < visibility.window, high - least < visibility.window
        if not visibility.causal:
            some, whole = some & (least - high < visibility.window), whole & (most - low < visibility.window)
        if visibility.kept:
            first, last = (rank[:, None] for rank in _bounds(visibility.key_ranks, keys))
            some, whole = some | (first < visibility.kept), whole | (last < visibility.kept)
    if visibility.causal:
        some, whole = some & (least <= high), whole & (most <= low)
    if visibility.prefix_length is not None:
        prefix = visibility.prefix_length[:, None, None]
        some, whole = some | (least < prefix), whole | (most < prefix)
    if visibility.segment_ids is not None:
        near, same = _documents(visibility, queries, keys)
        some, whole = some & near, whole & same
    filled = (jnp.arange(least.shape[-1]) + 1) * keys <= visibility.key_positions.shape[1]
    return some, whole & filled


def runs(some: jax.Array, whole: jax.Array) -> jax.Array:
    """int32 [B, rows, 6] of bool [B, rows, columns] tiles: for each row the columns to visit, see `RUN`.

    The first stretch ends at the first gap, the second goes on to the last column that is needed.
    """
    index = jnp.arange(some.shape[-1], dtype=jnp.int32)

    def first(found):
        return jnp.min(jnp.where(found, index, len(index)), axis=-1, keepdims=True)

    def stretch(found):
        start = first(found)
        return start, first(~found & (index >= start))

    start, end = stretch(some)
    following = first(some & (index >= end))
    last = jnp.max(jnp.where(some, index + 1, 0), axis=-1, keepdims=True)
    rows = [start, end - start, following, jnp.maximum(last - following, 0), *stretch(whole)]
    return jnp.concatenate(rows, axis=-1).astype(jnp.int32)


def _documents(visibility: Visibility, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Bool [B, rows, columns]: the ranges of ids, padding aside, overlap; all ids are one that is no padding."""
    limits = jnp.iinfo(jnp.int32)

    def ranges(ids, size):
        low, high = _bounds(ids, size, constant=0)
        least = _bounds(jnp.where(ids == 0, limits.max, ids), size)[0]
        most = _bounds(jnp.where(ids == 0, limits.min, ids), size)[1]
        return least, most, (low == high) & (low != 0)

    least, most, one = (x[:, :, None] for x in ranges(visibility.segment_ids, queries))
    key_least, key_most, key_one = (x[:, None] for x in ranges(visibility.key_segment_ids, keys))
    return (least <= key_most) & (key_least <= most), one & key_one & (least == key_least)


def _bounds(values: jax.Array, size: int, constant: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Least and largest of every `size` of int [B, T] values, the last of them repeated, or the constant, to fill."""
    fill = [(0, 0), (0, -values.shape[1] % size)]
    filled = jnp.pad(values, fill, mode="edge") if constant is None else jnp.pad(values, fill, constant_values=constant)
    blocks = filled.reshape(values.shape[0], -1, size)
    return blocks.min(axis=-1), blocks.max(axis=-1)
