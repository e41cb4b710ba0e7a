"""Grouped matmul for Hopper GPUs: a thread block for every tile of the result, its operands streamed by wide copies.

The first tile of a group begins up to 7 rows before it, where wide copies can, and the others follow, so that there are
hardly more tiles than the rows need even where groups are small. Blocks run at the same time, and none may write rows
of another's group: a tile that is not all its group's is stored in pieces of 64, 32, ... 1 rows, as many as are its
own. Every row is thus written once, and nothing is copied to a padded layout before. Rows of no group have tiles of
their own, which read nothing and store zeros. In the weight gradient rows of other groups are zeroed in shared memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.arguments import padded
from kernels_pallas.dispatch import unfit
from kernels_pallas.grouped_matmul.gradient import Products, grouped
from kernels_pallas.grouped_matmul.tiles import tiles, with_rest
from kernels_pallas.hopper import (
    ALIGNMENT,
    CONTRACTION,
    DTYPES,
    halves,
    interpreted,
    position,
    product,
    steps,
    store,
    tile,
)

_INNER = 8  # tiles of columns that run side by side, so that the rows they share are read once from memory


def obstacles(x, w, group_sizes) -> list[str]:
    """What of the inputs the kernels cannot honour, in words."""
    return unfit({"x": x, "w": w}, *DTYPES) + ["an empty array"] * (0 in (*x.shape, *w.shape))


CHOICES = {"rows": (64, 128), "columns": (64, 128), "stages": (2, 3, 4)}
"""Block sizes that tuning tries."""


def heuristic(x, w, group_sizes) -> dict[str, int]:
    """Tiles of 128 × 128, the largest whose sums fit one warpgroup's registers; 64 rows where most groups are smaller.

    Three slots of operands let two blocks share a multiprocessor, one multiplying while the other stores.
    """
    return {"rows": 64 if x.shape[0] <= 64 * w.shape[0] else 128, "columns": 128, "stages": 3}


def grouped_matmul(x, w, group_sizes, *, blocks: dict[str, int], simulated: bool):
    """x [M,K], w [E,K,N], group_sizes [E] → [M,N] in x's dtype; `rows` and `columns` of a tile are 64 or 128."""
    rows, columns = (64 if blocks[name] <= 64 else 128 for name in ("rows", "columns"))
    options = rows, columns, max(2, blocks["stages"]), simulated
    return grouped(Products(_products, _weight_gradient, options), x, w, group_sizes)


def _places(tall: int, rows: int, group_sizes):
    """int32 [4, L]: of each tile the first row it reads, how many of its rows are before its own, its own, its group.

    A tile reads within the rows there are: the last ones may begin before their own rows. Group -1 is that of the rows
    of no group.
    """
    parts = tiles(tall, rows, with_rest(rows, group_sizes), alignment=ALIGNMENT)
    there = jnp.arange(len(parts.rows)) < parts.count
    first = jnp.clip(parts.rows, 0, rows - tall)
    start, end = jnp.maximum(parts.rows, parts.starts), jnp.minimum(parts.rows + tall, parts.ends)
    group = jnp.where(parts.groups < len(group_sizes), parts.groups, -1)
    return jnp.stack([first, start - first, jnp.where(there, end - start, 0), group])


def _products(options, x, w, group_sizes, transposed: bool):
    """Rows of each group times its matrix, or the transpose of that; 0 behind the last group."""
    tall, wide, stages, simulated = options
    (rows, inputs), outputs = x.shape, w.shape[1 if transposed else 2]
    lying = (wide, CONTRACTION) if transposed else (CONTRACTION, wide)
    left = padded(halves(x), (tall if rows < tall else ALIGNMENT, CONTRACTION))
    right = padded(halves(w.astype(x.dtype)), lying)
    shape = left.shape[1], right.shape[2 if transposed else 3]
    places = _places(tall, shape[0], group_sizes)
    columns, passes = shape[1] // wide, steps(left, inputs)

    def body(places_g, left_g, right_g, y_g):
        column = lax.axis_index("outer") * _INNER + lax.axis_index("inner")
        first, before, own, group = (places_g[i, lax.axis_index("tile")] for i in range(4))
        first, own = pl.multiple_of(first, ALIGNMENT), jnp.where(column < columns, own, 0)
        span = pl.ds(column * wide, wide)

        def sources(step):
            i, j, k = position(step, left.shape[2] // CONTRACTION)
            part = pl.ds(k, CONTRACTION)
            across = (span, part) if transposed else (part, span)
            return left_g.at[i, pl.ds(first, tall), part], right_g.at[j, group, *across]

        def multiply(acc, step, rows, matrix):
            plgpu.wgmma(acc, rows, matrix.transpose((1, 0)) if transposed else matrix)

        length = jnp.where((own > 0) & (group >= 0), passes, 0)
        slots = tile((stages, tall, CONTRACTION), left.dtype), tile((stages, *lying), left.dtype)
        y = product((tall, wide), sources, multiply, length, slots).astype(x.dtype)

        @pl.when(own == tall)
        def _():
            store(y_g.at[pl.ds(first, tall), span], y.dtype, lambda: y)

        @pl.when(own < tall)
        def _():
            pieces = plgpu.SMEM((tall, wide), x.dtype)
            pl.run_scoped(lambda y_s: _store_pieces(y, y_s, y_g.at[:, span], first, before, own), pieces)

    outer = -(-columns // _INNER)
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(outer, places.shape[1], min(columns, _INNER)),
        grid_names=("outer", "tile", "inner"),
        interpret=interpreted(simulated),
        kernel_name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(places, left, right)
    return y[:rows, :outputs]


def _store_pieces(values, staged, target, first, before, own) -> None:
    """Rows `before`, ..., `before + own - 1` alone, in pieces of a power of two: a copy's shape must be static."""
    staged[...] = values
    plgpu.commit_smem()
    row, size = before, staged.shape[0] // 2
    while size:
        piece = own & size

        @pl.when(piece > 0)
        def _(row=row, size=size):
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, size)], target.at[pl.ds(first + row, size)])

        row, size = row + piece, size // 2
    plgpu.wait_smem_to_gmem(0)


def _weight_gradient(options, x, dy, w, group_sizes):
    """[E,K,N] in w's dtype: of each group, its rows' outer products with dy, summed in float32; 0 of an empty one."""
    _, wide, stages, simulated = options
    least = CONTRACTION if x.shape[0] < CONTRACTION else ALIGNMENT
    left, right = (padded(halves(value), (least, wide)) for value in (x, dy))
    rows = left.shape[1]
    shape = w.shape[0], left.shape[2], right.shape[2]
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    bounds = jnp.stack([jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends])

    def body(bounds_g, left_g, right_g, dw_g):
        group = lax.axis_index("group")
        spans = [pl.ds(lax.axis_index(name) * wide, wide) for name in ("row", "column")]
        start, end = bounds_g[0, group], bounds_g[1, group]
        origin = lax.div(start, jnp.int32(ALIGNMENT)) * ALIGNMENT
        passes = jnp.where(end > start, lax.div(end - origin + (CONTRACTION - 1), jnp.int32(CONTRACTION)), 0)

        def place(step):
            """Halves, the first row that is meant, and the first that is read."""
            i, j, k = position(step, jnp.maximum(passes, 1))
            return i, j, origin + k, pl.multiple_of(jnp.minimum(origin + k, rows - CONTRACTION), ALIGNMENT)

        def sources(step):
            i, j, _, row = place(step)
            part = pl.ds(row, CONTRACTION)
            return left_g.at[i, part, spans[0]], right_g.at[j, part, spans[1]]

        def multiply(acc, step, left, right):
            _, _, meant, row = place(step)

            @pl.when((meant < start) | (meant + CONTRACTION > end))
            def _():
                for operand in (left, right):
                    _keep(operand, jnp.maximum(meant, start) - row, end - row)
                plgpu.commit_smem()

            plgpu.wgmma(acc, left.transpose((1, 0)), right)

        slots = [tile((stages, CONTRACTION, wide), left_g.dtype)] * 2
        dw = product((wide, wide), sources, multiply, steps(left_g, CONTRACTION) * passes, slots)
        store(dw_g.at[group, *spans], w.dtype, lambda: dw)

    dw = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, w.dtype),
        grid=(shape[0], shape[1] // wide, shape[2] // wide),
        grid_names=("group", "row", "column"),
        interpret=interpreted(simulated),
        kernel_name="grouped_matmul_weights",
    )(bounds, left, right)
    return dw[:, : w.shape[1], : w.shape[2]]


def _keep(operand, start, end) -> None:
    """Zero all rows but `start`, ..., `end - 1`; whatever they hold, NaN too."""
    values = plgpu.load(operand, layout=plgpu.Layout.WGMMA, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, operand.shape, 0, layout=plgpu.Layout.WGMMA)
    operand[...] = jnp.where((row >= start) & (row < end), values, jnp.zeros_like(values))
