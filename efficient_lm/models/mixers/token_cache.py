"""What attention remembers: some arrays for every token that a later one may see."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.mixers.base import Cache
from kernels_pallas.attention.visibility import Visibility


@dataclass(frozen=True)
class TokenCache:
    """A slot for every token, or a ring of slots behind the kept tokens where there is a window.

    A cache holds `positions` and `segment_ids` int32 ``[batch, slots]`` (0 marks an empty slot), `seen` int32
    ``[batch]``, the number of tokens written so far, and the values of each token ``[batch, slots, ...]`` by name.

    Attributes:
        window: tokens that a token sees, itself included; None sees all.
        kept: first tokens of a document that stay beyond the window.
    """

    window: int | None = None
    kept: int = 0

    def empty(self, batch: int, length: int, dtype: jax.typing.DTypeLike, **shapes: tuple[int, ...]) -> Cache:
        """A cache for `length` tokens, or for the kept tokens and one window where that is less.

        `shapes` are those of one token's values, by name.
        """
        slots = length if self.window is None else min(length, self.kept + self.window)
        integers = jnp.zeros((batch, slots), jnp.int32)
        values = {name: jnp.zeros((batch, slots, *shape), dtype) for name, shape in shapes.items()}
        return {**values, "positions": integers, "segment_ids": integers, "seen": jnp.zeros((batch,), jnp.int32)}

    def remember(self, cache: Cache, context: Context, **values: jax.Array) -> Cache:
        """Write these tokens; padding is not written, nor what a later token of the same piece would overwrite."""
        real = context.segment_ids != 0
        order = cache["seen"][:, None] + jnp.cumsum(real, axis=1) - 1
        slot, end = order, cache["seen"] + jnp.sum(real, axis=1)
        write, ring = real, self._ring(cache)
        if ring is not None:
            last = jnp.max(context.segment_ids, 1, keepdims=True)
            first = (context.positions < self.kept) & (context.segment_ids == last)
            slot = jnp.where(first, context.positions, self.kept + order % ring)
            write = real & (first | (order >= end[:, None] - ring))
        slot = jnp.where(write, slot, cache["positions"].shape[1])
        row = jnp.arange(real.shape[0])[:, None]
        written = {
            name: cache[name].at[row, slot].set(value.astype(cache[name].dtype), mode="drop")
            for name, value in _with_places(context, values).items()
        }
        return {**written, "seen": end}

    def visible(self, old: Cache, new: Cache, context: Context, **values: jax.Array) -> Cache:
        """What the tokens of a piece look at, given the cache before and after them.

        Single tokens overwrite what no query sees any more; longer pieces also look at what they would overwrite.
        """
        if context.segment_ids.shape[1] == 1 or self._ring(old) is None:
            return new
        return {
            name: jnp.concatenate([old[name], value.astype(old[name].dtype)], axis=1)
            for name, value in _with_places(context, values).items()
        }

    def _ring(self, cache: Cache) -> int | None:
        """Slots of the ring behind the kept tokens; None if there is no window and every token keeps its slot."""
        return None if self.window is None else max(cache["positions"].shape[1] - self.kept, 1)


def truncated(after: Any, before: Any, more: jax.Array | int) -> Any:
    """Caches without a window in any nesting: those `after` some tokens, with only so many `more` than `before` them.

    Args:
        after, before: of one model; in what is no token cache nothing changes.
        more: int32 ``[batch]``, or of all rows.
    """
    if not isinstance(after, dict):
        return after
    if "seen" not in after:
        return {name: truncated(part, before[name], more) for name, part in after.items()}
    seen = before["seen"] + more
    there = jnp.arange(after["segment_ids"].shape[-1]) < seen[..., None]
    return {**after, "seen": seen, "segment_ids": jnp.where(there, after["segment_ids"], 0)}


def rows(context: Context, window: int | None) -> tuple[jax.Array, dict[str, jax.Array | None]]:
    """For attention without a cache: where tokens are, int32 ``[1 or batch, time]``, and what bounds their sight.

    Rows are in order: distances are differences of the index, unless tokens are missing in between.
    """
    masks = {"segment_ids": context.segment_ids if context.packed else None}
    if not context.gaps:
        return jnp.arange(context.positions.shape[1], dtype=jnp.int32)[None], masks
    if window is not None:
        masks |= {"query_positions": context.positions, "key_positions": context.positions}
    return context.positions, masks


def places(context: Context, visible: Cache) -> dict[str, jax.Array]:
    """For `kernels_pallas.attention`: where queries are and what they look at, in order and document."""
    return {
        "segment_ids": context.segment_ids, "key_segment_ids": visible["segment_ids"],
        "query_positions": context.positions, "key_positions": visible["positions"],
    }  # fmt: skip


def shown(context: Context, visible: Cache, window: int | None, kept: int) -> dict[str, jax.Array]:
    """For `kernels_pallas.decode_attention` of one token in each row: which slots it sees, and how far these reach."""
    rule = Visibility(
        query_positions=context.positions, key_positions=visible["positions"], key_ranks=visible["positions"],
        segment_ids=context.segment_ids, key_segment_ids=visible["segment_ids"],
        prefix_length=None, causal=True, window=window, kept=kept, in_order=False,
    )  # fmt: skip
    seen = rule.mask()[:, 0]
    return {"visible": seen, "lengths": jnp.max(seen * jnp.arange(1, seen.shape[1] + 1, dtype=jnp.int32), axis=1)}


def mean_seen(context_length: int, window: int | None, kept: int) -> float:
    """Tokens that one token attends to, averaged over a sequence."""
    window = min(window or context_length, context_length)
    ramp = window * (window + 1) / 2 + (context_length - window) * window
    kept = min(kept, max(context_length - window, 0))
    return (ramp + kept * (context_length - window - kept / 2)) / context_length


def _with_places(context: Context, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {**values, "positions": context.positions, "segment_ids": context.segment_ids}


def memory_faults(window: int | None, kept_tokens: int) -> Iterator[tuple[str, str]]:
    """Faults of what a spec says attention remembers."""
    if kept_tokens and window is None:
        yield "kept_tokens", "tokens are kept beyond a window, and there is none: set window too"
