"""Grouped matmul in plain JAX for any backend: a loop over tiles of rows, each tile of one group.

A tile is a slice of consecutive rows that begins inside a group. Its last rows may belong to the groups behind: what is
written there is written again by their own tiles, which come later, and in the weight gradient they count as 0. There
are at most M / tile + E tiles and the loop runs over those there are, so that neither time nor memory is spent on
rows times groups.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.gradient import Products, grouped
from kernels_pallas.grouped_matmul.tiles import tiles


def default_tile(rows: int, groups: int, backend: str) -> int:
    """Rows per tile that ran fastest: see `benchmarks/grouped_matmul.py`.

    A power of two no larger than the mean group, for what a tile has beyond its group is wasted; on CPUs at most 128,
    where products are as fast as larger ones. Accelerators want large products (a choice, not a measurement).
    """
    mean, largest = max(1, rows // groups), 128 if backend == "cpu" else 2048
    return min(largest, max(8, 1 << (mean.bit_length() - 1)))


def grouped_matmul(x, w, group_sizes, *, tile: int):
    """x [M,K], w [E,K,N], group_sizes [E] → [M,N] in x's dtype."""
    return grouped(Products(_products, _weight_gradient, tile), x, w, group_sizes)


def _padded(values, tile):
    """So that the last tile has rows to read."""
    return jnp.pad(values, ((0, tile), (0, 0)))


def _products(tile, x, w, group_sizes, transposed: bool):
    """Rows of each group times its matrix, or the transpose of that; 0 behind the last group."""
    rows, outputs = x.shape[0], w.shape[1 if transposed else 2]
    parts = tiles(tile, rows, group_sizes)
    padded = _padded(x, tile)
    contraction = (((1,), (1 if transposed else 0,)), ((), ()))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def step(index, y):
        start = parts.rows[index]
        part = lax.dynamic_slice_in_dim(padded, start, tile)
        matrix = lax.dynamic_index_in_dim(w, parts.groups[index], keepdims=False).astype(x.dtype)
        product = lax.dot_general(part, matrix, contraction, preferred_element_type=wide)
        return lax.dynamic_update_slice_in_dim(y, product.astype(x.dtype), start, 0)

    y = lax.fori_loop(0, parts.count, step, jnp.zeros((rows + tile, outputs), x.dtype))[:rows]
    return jnp.where((jnp.arange(rows) < jnp.sum(group_sizes))[:, None], y, 0)


def _weight_gradient(tile, x, dy, w, group_sizes):
    """[E,K,N] in w's dtype: of each group, its rows' outer products with dy, summed in float32."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), jnp.float32)
    parts = tiles(tile, x.shape[0], group_sizes)
    x, dy = _padded(x, tile), _padded(dy, tile)

    def step(index, dw):
        start, group = parts.rows[index], parts.groups[index]
        own = (start + jnp.arange(tile) < parts.ends[index])[:, None]
        part, pull = (jnp.where(own, lax.dynamic_slice_in_dim(rows, start, tile), 0) for rows in (x, dy))
        # XLA on CPUs is slow at products that contract the rows of the left operand: the transpose is made first.
        turned = lax.optimization_barrier(part.T) if jax.default_backend() == "cpu" else part.T
        total = lax.dynamic_index_in_dim(dw, group) + jnp.matmul(turned, pull, preferred_element_type=wide)[None]
        return lax.dynamic_update_slice_in_dim(dw, total, group, 0)

    return lax.fori_loop(0, parts.count, step, jnp.zeros(w.shape, wide)).astype(w.dtype)
