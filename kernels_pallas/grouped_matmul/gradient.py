"""The gradient that every grouped matmul by tiles has, out of the implementation's own three products."""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax


class Products(NamedTuple):
    """How an implementation multiplies.

    Attributes:
        rows: ``(options, x [M,K], w [E,K,N], group_sizes, transposed)`` → [M,N] in x's dtype, of each row with its
            group's matrix; `transposed`: x is [M,N], and the result [M,K].
        weights: ``(options, x [M,K], dy [M,N], w, group_sizes)`` → [E,K,N] in w's dtype, of each group the sum of its
            rows' outer products.
        options: what both take first.
    """

    rows: Callable
    weights: Callable
    options: Hashable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(products: Products, x, w, group_sizes):
    """x [M,K], w [E,K,N], group_sizes [E] → [M,N] in x's dtype."""
    return products.rows(products.options, x, w, group_sizes, False)


def _forward(products, x, w, group_sizes):
    return grouped(products, x, w, group_sizes), (x, w, group_sizes)


def _backward(products, saved, dy):
    x, w, group_sizes = saved
    dy = dy.astype(x.dtype)
    dx = products.rows(products.options, dy, w, group_sizes, True)
    return dx, products.weights(products.options, x, dy, w, group_sizes), None


grouped.defvjp(_forward, _backward)
