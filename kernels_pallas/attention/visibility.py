"""Which keys a query sees: causal order, window, kept first tokens, prefix and documents, as one value."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocks import Piece, take


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_positions",
        "key_positions",
        "key_ranks",
        "prefix_length",
        "segment_ids",
        "key_segment_ids",
    ],
    meta_fields=["causal", "window", "kept", "in_order"],
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What the masking arguments of `attention` mean, positions made explicit.

    `query_positions` [1|B, T] and `key_positions` [1|B, S] order the tokens. `key_ranks` [1|B, S] counts the tokens
    before a key in its document (for `kept`). `in_order` says that positions are indices, the queries being the last
    T of S, so that the keys a block of queries can see are known before anything is computed.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    key_ranks: jax.Array
    prefix_length: jax.Array | None
    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    causal: bool
    window: int | None
    kept: int
    in_order: bool

    def mask(self, queries_last: bool = False) -> jax.Array | None:
        """Bool [1|B, T, S], or [1|B, S, T]: true where the query sees the key. None if every query sees every key."""
        query_axis, key_axis = (1, 2) if queries_last else (2, 1)

        def along(values, axis):
            return None if values is None else jnp.expand_dims(values, axis)

        return self.sees(
            along(self.query_positions, query_axis),
            along(self.key_positions, key_axis),
            along(self.key_ranks, key_axis),
            along(self.prefix_length, (1, 2)),
            along(self.segment_ids, query_axis),
            along(self.key_segment_ids, key_axis),
        )

    def sees(self, query, key, rank, prefix, query_document, key_document) -> jax.Array | None:
        """Whether queries see keys, given what this class holds of them, in shapes that broadcast; prefix and documents
        may be None. None if every query sees every key."""
        seen = None
        if self.window is not None:
            # No differences: query and key may be a row and a column, whose sums with a constant stay small.
            seen = key > query - self.window
            if not self.causal:
                seen &= key < query + self.window
            if self.kept:
                seen |= rank < self.kept
        if self.causal:
            seen = _both(seen, key <= query)
        if seen is not None and prefix is not None:
            seen |= key < prefix
        if query_document is not None:
            seen = _both(seen, (query_document == key_document) & (key_document != 0))
        return seen

    def rule(self) -> "Visibility":
        """What of it is static, enough for `sees`; True in place of prefix and documents where there are any."""
        absent = dict.fromkeys(("query_positions", "key_positions", "key_ranks", "key_segment_ids"))
        prefix = None if self.prefix_length is None else True
        return dataclasses.replace(
            self, **absent, prefix_length=prefix, segment_ids=None if self.segment_ids is None else True
        )

    def take(self, queries: Piece, keys: Sequence[Piece]) -> "Visibility":
        """The part for some consecutive queries, and for keys in one or more pieces."""

        def cut(values, pieces):
            return None if values is None else take(values, pieces, axis=1)

        return dataclasses.replace(
            self,
            query_positions=cut(self.query_positions, [queries]),
            key_positions=cut(self.key_positions, keys),
            key_ranks=cut(self.key_ranks, keys),
            segment_ids=cut(self.segment_ids, [queries]),
            key_segment_ids=cut(self.key_segment_ids, keys),
        )

    @property
    def after(self) -> int | None:
        """How many positions beyond its own a query can see; None if unknown or unlimited."""
        if not self.in_order or self.prefix_length is not None:
            return None
        return 0 if self.causal else None if self.window is None else self.window - 1

    @property
    def before(self) -> int | None:
        """How many positions before its own a query can see, apart from `first_keys`; None if unknown or unlimited."""
        scattered = self.kept > 0 and self.segment_ids is not None
        if not self.in_order or self.prefix_length is not None or self.window is None or scattered:
            return None
        return self.window - 1

    @property
    def first_keys(self) -> int:
        """How many of the first keys stay visible beyond `before`."""
        return 0 if self.before is None else min(self.kept, self.key_positions.shape[1])


def _both(left: jax.Array | None, right: jax.Array) -> jax.Array:
    return right if left is None else left & right


def document_ranks(segment_ids: jax.Array) -> jax.Array:
    """Number of earlier tokens of the same row with the same id; int32 [B, S]."""
    order = jnp.argsort(segment_ids, axis=-1, stable=True)
    ids = jnp.take_along_axis(segment_ids, order, axis=-1)
    index = jnp.broadcast_to(jnp.arange(ids.shape[-1], dtype=jnp.int32), ids.shape)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=-1)
    ranks = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.take_along_axis(ranks, jnp.argsort(order, axis=-1), axis=-1)
