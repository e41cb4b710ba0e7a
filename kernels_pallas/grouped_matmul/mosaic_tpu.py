"""Grouped matmul for TPUs: a grid over the parts of a group in a block of rows, in order, by a list made before.

Blocks begin at multiples of their size; one that holds rows of several groups is visited by each of them, one after
the other, while its result stays in fast memory, and each writes its own rows. Rows of no group visit too, to have
zeros. In the weight gradient the sum of a group stays in fast memory over the blocks it visits, of which the rows of
others count as 0; an empty group visits one, to have zeros. The scheme is that of MegaBlocks (arXiv 2211.15841).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arguments import padded
from kernels_pallas.dispatch import unfit
from kernels_pallas.grouped_matmul.gradient import Products, grouped
from kernels_pallas.grouped_matmul.tiles import Tiles, tiles, with_rest
from kernels_pallas.mxu import DTYPES, dot, interpreted, part


def obstacles(x, w, group_sizes) -> list[str]:
    """What of the inputs the kernels cannot honour, in words."""
    return unfit({"x": x, "w": w}, *DTYPES) + ["an empty array"] * (0 in (*x.shape, *w.shape))


CHOICES = {"rows": (128, 256, 512), "inputs": (512, 1024, 2048), "outputs": (256, 512, 1024)}
"""Block sizes that tuning tries."""


def heuristic(x, w, group_sizes) -> dict[str, int]:
    """Blocks that with their double buffers take some 12 MiB, within what a kernel has of fast memory by default.

    Rows: up to 512, so that a matrix is used often enough to hide its way from memory, and no more than the mean group.
    """
    mean = max(1, x.shape[0] // w.shape[0])
    rows = min(512, max(128, 1 << (mean.bit_length() - 1)))
    return {"rows": rows, "inputs": 1024 * 2 // x.dtype.itemsize, "outputs": 512}


def grouped_matmul(x, w, group_sizes, *, blocks: dict[str, int], simulated: bool):
    """x [M,K], w [E,K,N], group_sizes [E] → [M,N] in x's dtype; `rows` are rounded up to a multiple of 16."""
    rows = -(-blocks["rows"] // 16) * 16
    options = rows, part(w.shape[1], blocks["inputs"]), part(w.shape[2], blocks["outputs"]), simulated
    return grouped(Products(_products, _weight_gradient, options), x, w, group_sizes)


def _visits(parts: Tiles, size: int, groups: int):
    """int32 [4, L]: block, group, and first and first behind of the group's rows, of every visit in order.

    Behind the last visit it is repeated, with no rows.
    """
    index = jnp.minimum(jnp.arange(len(parts.rows)), parts.count - 1)
    own = (jnp.arange(len(parts.rows)) < parts.count) & (parts.groups < groups)
    start, end = (jnp.where(own, bound, 0) for bound in (parts.starts, parts.ends))
    return jnp.stack([parts.rows[index] // size, jnp.minimum(parts.groups[index], groups - 1), start, end])


def _own(visits, visit, shape):
    """Which rows of a block, all columns of it, are the visiting group's."""
    row = visits[0, visit] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= visits[2, visit]) & (row < visits[3, visit])


def _products(options, x, w, group_sizes, transposed: bool):
    """Rows of each group times its matrix, or the transpose of that; 0 behind the last group."""
    tall, inputs, outputs, simulated = options
    (rows, _), groups, outer = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    across = (inputs, outputs)
    inner_size, outer_size = across[::-1] if transposed else across
    left, right = padded(x, (tall, inner_size)), padded(w.astype(x.dtype), across)
    shape = left.shape[0], right.shape[1 if transposed else 2]
    visits = _visits(tiles(tall, shape[0], with_rest(shape[0], group_sizes), alignment=tall), tall, groups)

    def matrix(n, i, k, visits):
        return (visits[1, i], n, k) if transposed else (visits[1, i], k, n)

    y = pl.pallas_call(
        functools.partial(_rows_body, transposed),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape[1] // outer_size, visits.shape[1], left.shape[1] // inner_size),
            in_specs=[
                pl.BlockSpec((tall, inner_size), lambda n, i, k, visits: (visits[0, i], k)),
                pl.BlockSpec((None, *across), matrix),
            ],
            out_specs=pl.BlockSpec((tall, outer_size), lambda n, i, k, visits: (visits[0, i], n)),
            scratch_shapes=[pltpu.VMEM((tall, outer_size), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpreted(simulated),
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(visits, left, right)
    return y[:rows, :outer]


def _rows_body(transposed, visits, x_ref, w_ref, y_ref, acc):
    visit, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(visits[2, visit] < visits[3, visit])
    def _():
        acc[...] += dot(x_ref[...], w_ref[...], ((1,), (1 if transposed else 0,)))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        first = (visit == 0) | (visits[0, visit] != visits[0, jnp.maximum(visit - 1, 0)])
        before = jnp.where(first, 0.0, y_ref[...].astype(jnp.float32))
        y_ref[...] = jnp.where(_own(visits, visit, acc.shape), acc[...], before).astype(y_ref.dtype)


def _weight_gradient(options, x, dy, w, group_sizes):
    """[E,K,N] in w's dtype: of each group, its rows' outer products with dy, summed in float32; 0 of an empty one."""
    tall, inputs, outputs, simulated = options
    left, right = padded(x, (tall, inputs)), padded(dy, (tall, outputs))
    shape = w.shape[0], left.shape[1], right.shape[1]
    visits = _visits(tiles(tall, left.shape[0], group_sizes, alignment=tall, every=True), tall, w.shape[0])
    visits = visits.at[0].min(left.shape[0] // tall - 1)  # an empty last group begins behind the rows
    dw = pl.pallas_call(
        _weights_body,
        out_shape=jax.ShapeDtypeStruct(shape, w.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape[1] // inputs, shape[2] // outputs, visits.shape[1]),
            in_specs=[
                pl.BlockSpec((tall, inputs), lambda k, n, i, visits: (visits[0, i], k)),
                pl.BlockSpec((tall, outputs), lambda k, n, i, visits: (visits[0, i], n)),
            ],
            out_specs=pl.BlockSpec((None, inputs, outputs), lambda k, n, i, visits: (visits[1, i], k, n)),
            scratch_shapes=[pltpu.VMEM((inputs, outputs), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreted(simulated),
        name="grouped_matmul_weights",
    )(visits, left, right)
    return dw[:, : w.shape[1], : w.shape[2]]


def _weights_body(visits, x_ref, dy_ref, dw_ref, acc):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group = visits[1, visit]

    @pl.when((visit == 0) | (group != visits[1, jnp.maximum(visit - 1, 0)]))
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(visits[2, visit] < visits[3, visit])
    def _():
        rows = (
            jnp.where(_own(visits, visit, ref.shape), ref[...].astype(jnp.float32), 0.0).astype(ref.dtype)
            for ref in (x_ref, dy_ref)
        )
        acc[...] += dot(*rows, ((0,), (0,)))

    @pl.when((visit == last) | (group != visits[1, jnp.minimum(visit + 1, last)]))
    def _():
        dw_ref[...] = acc[...].astype(dw_ref.dtype)
