"""Rows in groups, each group with parameters of its own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class Groups:
    """Which rows of ``[rows, ...]``, sorted by group, are of which group.

    Attributes:
        sizes: int32 ``[groups]``, rows of each; rows behind them are of no group. None: groups of one size.
    """

    sizes: jax.Array | None = None

    def product(self, rows: jax.Array, weight: jax.Array) -> jax.Array:
        """`rows [rows, in]` times their group's matrix of `weight [groups, in, out]` → ``[rows, out]``, same dtype."""
        if self.sizes is not None:
            return grouped_matmul(rows, weight, self.sizes)
        cut = rows.reshape(weight.shape[0], -1, rows.shape[-1])
        return jnp.matmul(cut, weight.astype(rows.dtype)).reshape(rows.shape[0], -1)

    def spread(self, values: jax.Array, rows: int) -> jax.Array:
        """`values [groups, ...]` → ``[rows, ...]``, those of each row's group; 0 for rows of no group."""
        if self.sizes is None:
            return jnp.repeat(values, rows // values.shape[0], axis=0)
        groups = jnp.searchsorted(jnp.cumsum(self.sizes), jnp.arange(rows), side="right")
        return values.at[groups].get(mode="fill", fill_value=0, indices_are_sorted=True)


def spread(values: jax.Array, groups: Groups | None, rows: int) -> jax.Array:
    """What every row is given: `values` themselves, or of ``[groups, ...]`` those of its group."""
    return values if groups is None else groups.spread(values, rows)
