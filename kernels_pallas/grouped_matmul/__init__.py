"""Rows in groups, each group with a matrix of its own: the product in a dropless mixture of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import check_rank, check_shape, check_sign
from kernels_pallas.dispatch import choose
from kernels_pallas.grouped_matmul import reference, tokamax, xla
from kernels_pallas.partition import partitioned
from kernels_pallas.target import current


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, tile: int | None = None, implementation: str = "auto"
) -> jax.Array:
    """y_r = x_r w[g(r)]: the first `group_sizes[0]` rows meet w[0], the next `group_sizes[1]` w[1], and so on.

    Rows beyond the sum of sizes belong to no group: there y, and the gradient in x, are 0, and what they hold reaches
    nothing. A group may be empty; the gradient in its matrix is 0.

    Args:
        x: [M, K] rows sorted by group; their dtype is that of the products, which accumulate in float32.
        w: [E, K, N] in any float dtype; its gradient has that dtype and accumulates in float32.
        group_sizes: int [E].
        tile: rows of a group that are multiplied at a time, in implementations by tiles, of which a kernel takes the
            nearest that it can; changes no value. None: one that ran fast.
        implementation: "auto", "xla" (by tiles, memory independent of E besides w and its gradient), "pallas" (a
            kernel by tiles, on TPUs and Hopper GPUs), "tokamax" (the package) or "reference" (every row meets every
            matrix). Where a mesh divides the rows the caller maps this function over them, with the sizes of a device's
            own rows: a kernel that is called with rows of several devices runs with all of them on every one.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: shapes that do not fit; sizes below 0 or of more than M rows, where the values can be seen. Under a
            transformation they cannot: groups then end where the rows do.
    """
    op = "grouped_matmul"
    check_rank(op, "x", x, "rows, inputs")
    check_rank(op, "w", w, "groups, inputs, outputs")
    check_shape(op, "w", w, (w.shape[0], x.shape[1], w.shape[2]))
    check_shape(op, "group_sizes", group_sizes, w.shape[:1])
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{op}: group_sizes must be integers, not {group_sizes.dtype}")
    if tile is not None and tile < 1:
        raise ValueError(f"{op}: tile must be at least 1, not {tile}")
    check_sign(op, "group_sizes", group_sizes, 1)
    _check_sum(op, group_sizes, x.shape[0])
    inputs, target = (x, w, group_sizes), current()
    shapes = tuning.bucket(rows=x.shape[0], groups=w.shape[0], inputs=w.shape[1], outputs=w.shape[2])
    no_tile = [] if tile is None else ["tile"]
    others = {"xla": [], "reference": no_tile, "tokamax": no_tile + tokamax.obstacles()}
    name = choose(op, implementation, kernel.ranked(op, target, shapes, inputs, **others))
    if name == "pallas":
        held = kernel.module(op, target)
        blocks = tuning.blocks(op, target, shapes, held.heuristic(*inputs)) | ({} if tile is None else {"rows": tile})
        run = functools.partial(held.grouped_matmul, blocks=blocks, simulated=target.simulated)
        return partitioned(lambda *inputs: (run(*inputs),), inputs, [()] * 3, [()])[0]
    if name == "tokamax":
        return tokamax.grouped_matmul(x, w, group_sizes)
    if name == "reference":
        return reference.grouped_matmul(x, w, group_sizes)
    if tile is None:
        tile = xla.default_tile(x.shape[0], w.shape[0], jax.default_backend())
    return xla.grouped_matmul(x, w, group_sizes, tile=tile)


def _check_sum(op: str, group_sizes: jax.Array, rows: int) -> None:
    """Refuse sizes that can be seen (no tracer) and add up to more than the rows."""
    if isinstance(group_sizes, jax.core.Tracer) or not getattr(group_sizes, "is_fully_addressable", True):
        return
    total = int(np.sum(np.asarray(group_sizes)))
    if total > rows:
        raise ValueError(f"{op}: {total} rows in groups, but x has {rows}")
