"""Cutting a sequence into blocks: bands of equal blocks that share one loop, and the pieces of arrays they need."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Piece = tuple[int | jax.Array, int]  # start (static or traced) and static length
Band = tuple[int, int, int]  # first index, length of a block, number of blocks

MOST_BANDS = 8


def take(values: jax.Array, pieces: Sequence[Piece], axis: int) -> jax.Array:
    """The given pieces of `values` along an axis, one after the other."""
    parts = [_cut(values, start, length, axis) for start, length in pieces]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _cut(values, start, length, axis):
    if isinstance(start, int):
        return jax.lax.slice_in_dim(values, start, start + length, axis=axis)
    return jax.lax.dynamic_slice_in_dim(values, start, length, axis)


def add_pieces(total: jax.Array, values: jax.Array, pieces: Sequence[Piece], axis: int) -> jax.Array:
    """Add `values`, laid out as `take` returns them, to the pieces of `total` they belong to."""
    offset = 0
    for start, length in pieces:
        part = _cut(values, offset, length, axis) + _cut(total, start, length, axis)
        total = jax.lax.dynamic_update_slice_in_dim(total, part, start, axis)
        offset += length
    return total


def bands(length: int, block: int, split: bool) -> list[Band]:
    """Cover `length` indices by blocks; if `split`, in several bands, so that each can have its own static reach."""
    full, rest = divmod(length, block)
    step = max(1, -(-full // MOST_BANDS) if split or full <= MOST_BANDS else full)
    cover = [(i * block, block, min(step, full - i)) for i in range(0, full, step)]
    return cover + [(full * block, rest, 1)] * (rest > 0)


def reach(start: int, stop: int, back: int | None, ahead: int | None, limits: tuple[int, int]) -> tuple[int, int]:
    """What indices start..stop look at: `back` before and `ahead` after each (None: all there is), within limits."""
    low, high = limits
    first = low if back is None else min(max(start - back, low), high)
    last = high if ahead is None else max(min(stop + ahead, high), low)
    return first, max(first, last)


def piece(start, block: int, back: int | None, ahead: int | None, within: tuple[int, int]) -> Piece:
    """The part of a band's reach that one of its blocks needs, its length the same for every block."""
    low, high = within
    if back is None or ahead is None or block + back + ahead >= high - low:
        return low, high - low
    length = block + back + ahead
    return jnp.clip(start - back, low, high - length), length


def scan_band(body: Callable, carry, band: Band):
    """Run `carry, out = body(carry, start, block)` over the blocks of a band; the outputs come stacked."""
    start, block, count = band
    if count == 1:
        carry, out = body(carry, start, block)
        return carry, jax.tree.map(lambda x: x[None], out)
    starts = start + block * jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, start: body(carry, start, block), carry, starts)


def unstack(stacked: Sequence[jax.Array], axis: int) -> jax.Array:
    """Join the stacked blocks [count, ..., block, ...] of consecutive bands along `axis` of a block."""
    merged = []
    for blocks in stacked:
        moved = jnp.moveaxis(blocks, 0, axis)
        shape = moved.shape
        merged.append(moved.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))
    return merged[0] if len(merged) == 1 else jnp.concatenate(merged, axis)
