"""Which tiles of the logits a fused kernel visits: those where some query of a block may see some key of a block.

Tiles are judged by the ranges of positions, ranks and documents of their blocks, so that causality, windows and packed
documents leave out whole tiles. A kernel that follows a list of `visits`, or `stretches`, never loads the others.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.visibility import Visibility

IDLE, PARTLY, WHOLLY = 0, 1, 2
"""Of a visit: nothing to compute, some queries may see some keys, every query sees every key."""
_FAR = np.iinfo(np.int32).max


class Visits(NamedTuple):
    """Tiles in the order in which they are visited, int32 [1 or B, N]; N is known from the shapes.

    All visits of one block of queries (of keys, if listed by keys) follow each other, and each block has at least one.
    Rows with fewer visits repeat their last one, idle.
    """

    query: jax.Array
    key: jax.Array
    kind: jax.Array


def visits(visibility: Visibility, time: int, keys: int, blocks: tuple[int, int], *, by_key: bool = False) -> Visits:
    """List the tiles of `blocks` = (queries, keys) that `time` queries and `keys` keys need."""
    outer, inner = np.nonzero(_listed(visibility, time, keys, blocks, by_key))
    query, key = (inner, outer) if by_key else (outer, inner)
    some, every = tiles(visibility, time, keys, blocks)
    unneeded = ~jnp.any(some, axis=1 if by_key else 2)[:, outer]
    some, every = some[:, query, key], every[:, query, key]
    # A block that needs no tile is visited once all the same: its output has to be written.
    wanted = some | (unneeded & np.r_[True, outer[1:] != outer[:-1]])
    order = jnp.argsort(~wanted, axis=1, stable=True)
    count = jnp.sum(wanted, axis=1, keepdims=True)
    index = jnp.arange(len(outer))[None]
    order = jnp.take_along_axis(order, jnp.minimum(index, count - 1), axis=1)
    kind = jnp.where(some, jnp.where(every, WHOLLY, PARTLY), IDLE)
    kind = jnp.where(index < count, jnp.take_along_axis(kind, order, axis=1), IDLE)
    tables = jnp.asarray(query, jnp.int32)[order], jnp.asarray(key, jnp.int32)[order]
    return Visits(*tables, kind.astype(jnp.int32))


def stretches(some: jax.Array, every: jax.Array) -> jax.Array:
    """For each row of `tiles` the columns to visit, as a few numbers: int32 [1|B, rows, 6].

    Two stretches of columns, each its first one and their number: up to the first gap, and from there to the last that
    is needed. Then the ends of a stretch in which every query sees every key: its first column and the one after it.
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
    parts = [start, end - start, following, jnp.maximum(last - following, 0), *stretch(every)]
    return jnp.concatenate(parts, axis=-1).astype(jnp.int32)


def _listed(visibility, time, keys, blocks, by_key) -> np.ndarray:
    """Bool [queries, keys] of blocks, or [keys, queries]: the tiles that may be needed, as far as shapes tell."""
    if visibility.in_order and visibility.prefix_length is None:
        index = np.arange(keys, dtype=np.int32)[None]
        scattered = visibility.kept > 0 and visibility.segment_ids is not None
        plain = dataclasses.replace(
            visibility,
            query_positions=np.arange(keys - time, keys, dtype=np.int32)[None],
            key_positions=index,
            key_ranks=index,
            segment_ids=None,
            key_segment_ids=None,
            window=None if scattered else visibility.window,
        )
        some = np.array(tiles(plain, time, keys, blocks)[0][0])
    else:
        some = np.ones((-(-time // blocks[0]), -(-keys // blocks[1])), bool)
    some = some.T if by_key else some
    some[:, 0] |= ~some.any(axis=1)
    return some


def tiles(visibility: Visibility, time: int, keys: int, blocks: tuple[int, int]):
    """Bool [1|B, queries, keys] of blocks: some query may see some key of the tile; every query sees every key."""
    xp = np if isinstance(visibility.query_positions, np.ndarray) else jnp
    query_low, query_high = (x[:, :, None] for x in _ranges(xp, visibility.query_positions, blocks[0]))
    low, high = (x[:, None] for x in _ranges(xp, visibility.key_positions, blocks[1]))
    some = every = xp.ones((1, query_low.shape[1], low.shape[2]), bool)
    if visibility.window is not None:
        some, every = query_low - high < visibility.window, query_high - low < visibility.window
        if not visibility.causal:
            some, every = some & (low - query_high < visibility.window), every & (high - query_low < visibility.window)
        if visibility.kept:
            rank_low, rank_high = (x[:, None] for x in _ranges(xp, visibility.key_ranks, blocks[1]))
            some, every = some | (rank_low < visibility.kept), every | (rank_high < visibility.kept)
    if visibility.causal:
        some, every = some & (low <= query_high), every & (high <= query_low)
    if visibility.prefix_length is not None:
        prefix = visibility.prefix_length[:, None, None]
        some, every = some | (low < prefix), every | (high < prefix)
    if visibility.segment_ids is not None:
        near, same = _documents(xp, visibility, blocks)
        some, every = some & near, every & same
    return some, every & (np.arange(1, low.shape[2] + 1) * blocks[1] <= keys)


def _documents(xp, visibility: Visibility, blocks: tuple[int, int]):
    """Bool [B, queries, keys] of blocks: the ranges of ids overlap; all ids are one and the same, and no padding."""
    rows = visibility.segment_ids, visibility.key_segment_ids
    axes = (slice(None), slice(None), None), (slice(None), None)
    parts = [(ids, block, axis) for ids, block, axis in zip(rows, blocks, axes, strict=True)]
    (low, high), (key_low, key_high) = ([x[axis] for x in _ranges(xp, ids, block, 0)] for ids, block, axis in parts)
    same = (low == high) & (key_low == key_high) & (low == key_low) & (low != 0)
    live = [
        (
            _ranges(xp, xp.where(ids == 0, _FAR, ids), block, _FAR)[0][axis],
            _ranges(xp, xp.where(ids == 0, -_FAR, ids), block, -_FAR)[1][axis],
        )
        for ids, block, axis in parts
    ]
    (low, high), (key_low, key_high) = live
    return (low <= key_high) & (key_low <= high), same


def _ranges(xp, values, block: int, filling: int | None = None):
    """Least and greatest of [rows, time] in each block: twice [rows, blocks]. A rest is filled up, or its end kept."""
    options = {"mode": "edge"} if filling is None else {"constant_values": filling}
    parts = xp.pad(values, ((0, 0), (0, -values.shape[1] % block)), **options)
    parts = parts.reshape(values.shape[0], -1, block)
    return parts.min(axis=-1), parts.max(axis=-1)
