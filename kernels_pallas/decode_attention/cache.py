"""A cache of keys and values, what of it a query sees, and the sum of parts that saw different slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.attention.visibility import Visibility


class Cache(NamedTuple):
    """The arguments of `decode_attention` of these names."""

    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    page_table: jax.Array | None
    visible: jax.Array | None

    @property
    def slots(self) -> int:
        """Of a row: S."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def gathered(self) -> "Cache":
        """The cache with the pages of every row next to each other."""
        if self.page_table is None:
            return self
        used = jnp.arange(self.page_table.shape[1]) * self.k.shape[1] < self.lengths[:, None]
        pages = jnp.where(used, self.page_table, 0)
        rows, slots = len(self.lengths), self.slots
        k, v = (x[pages].reshape(rows, slots, *x.shape[2:]) for x in (self.k, self.v))
        return self._replace(k=k, v=v, page_table=None)

    def visibility(self, time: int, window: int | None) -> Visibility:
        """What the last `time` tokens of every row see."""
        slots = jnp.arange(self.slots, dtype=jnp.int32)[None]
        first = self.lengths[:, None].astype(jnp.int32) - time
        queries = first + jnp.arange(time, dtype=jnp.int32)
        seen = self.visible is not None
        return Visibility(
            query_positions=queries,
            key_positions=slots,
            key_ranks=slots,
            prefix_length=None,
            segment_ids=jnp.ones_like(queries) if seen else None,
            key_segment_ids=self.visible.astype(jnp.int32) if seen else None,
            causal=True,
            window=window,
            kept=0,
            in_order=False,
        )


def merged(means: jax.Array, logsumexps: jax.Array, sinks: jax.Array | None, axis: int) -> jax.Array:
    """Means of values over parts of the slots as one over all of them, the parts along `axis`.

    Args:
        means: float32 [..., V]. logsumexps: float32 [...] to base e, `NOTHING` where a part saw nothing. sinks: of the
            shape of the result without V, or one that broadcasts.
    """
    largest = jnp.max(logsumexps, axis=axis)
    largest = largest if sinks is None else jnp.maximum(largest, sinks)
    weights = jnp.where(logsumexps > NOTHING / 2, jnp.exp(logsumexps - jnp.expand_dims(largest, axis)), 0)
    total = jnp.sum(weights, axis=axis)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    mean = jnp.sum(weights[..., None] * means, axis=axis)
    return mean / jnp.where(total == 0, 1, total)[..., None]
