"""Linear cross-entropy for Hopper GPUs: tiles of logits on the tensor cores, hidden states and head streamed by them.

A thread block has 128 tokens and, in the loss, a run of the vocabulary, over which it keeps the largest logit and the
sum of exponentials; runs of a token are merged outside. Blocks beside each other have the same tokens and the next run,
so that those at work together share both in the cache of the chip. In the gradient a block has one tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.arguments import padded
from kernels_pallas.dispatch import unfit
from kernels_pallas.hopper import (
    CONTRACTION,
    DTYPES,
    Stream,
    barrier,
    halves,
    interpreted,
    position,
    product,
    steps,
    store,
    tile,
)
from kernels_pallas.linear_cross_entropy import recomputed
from kernels_pallas.linear_cross_entropy.tokens import capped, pulled

_INNER = 8  # tiles of the vocabulary that run side by side, so that the tokens they share are read once from memory
_COLUMNS = 128
_PART = 64  # columns of a tile that registers hold besides its products
_LOWEST = -1e30
"""Below every logit, and finite: a difference of two of these is 0."""


def obstacles(x, w) -> list[str]:
    """What of the inputs the kernels cannot honour, in words."""
    return unfit({"x": x, "w": w}, *DTYPES) + ["an empty array"] * (0 in (*x.shape, *w.shape))


CHOICES = {"rows": (64, 128), "stages": (2, 3, 4), "runs": (8, 16, 32)}
"""Block sizes that tuning tries."""


def heuristic(x, w) -> dict[str, int]:
    """Tiles of 128 × 128 logits, the largest whose sums fit one warpgroup's registers, with three slots of operands.

    Runs of the vocabulary: 16, for then as many tokens as runs are at work together and their tiles are shared most;
    more where tokens are so few that the chip, with 264 blocks at a time, would have less than four rounds of work.
    """
    runs = max(16, -(-4 * 264 * 128 // x.shape[0]))
    return {"rows": 128, "stages": 3, "runs": runs, "chunk": recomputed.default_chunk(x.shape[0], w.shape[1])}


def linear_cross_entropy(x, w, labels, weights, *, softcap: float | None, blocks: dict[str, int], simulated: bool):
    """Weighted sums of cross entropy, squared log-normaliser and hits; x [N,D], w [D,V], labels and weights [N]."""
    options = 64 if blocks["rows"] <= 64 else 128, max(2, blocks["stages"]), blocks["runs"], softcap, simulated
    parts = recomputed.parts(x.shape[0], blocks["chunk"])
    return recomputed.sums(recomputed.Kernels(_measure, _pull, options, parts), x, w, labels, weights)


def _operands(x, head, rows: int):
    return padded(halves(x), (rows, CONTRACTION)), padded(halves(head), (CONTRACTION, _COLUMNS))


def _slots(rows: int, stages: int, dtype):
    return tile((stages, rows, CONTRACTION), dtype), tile((stages, CONTRACTION, _COLUMNS), dtype)


def _across(vector, shape):
    return lax.broadcast_in_dim(vector, shape, [0])


def _of_rows(buffer):
    return plgpu.load(buffer, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _is_label(labels, shape, first):
    """Where in a tile that begins with column `first` the labels are."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) == _across(labels - first, shape)


def _measure(options, x, head, labels):
    """Largest logit, sum of exponentials below it and label's logit, float32 [S,N] of S runs of the vocabulary."""
    rows, stages, runs, softcap, simulated = options
    left, right = _operands(x, head, rows)
    tokens, vocabulary, passes = left.shape[1], head.shape[1], steps(left, x.shape[1])
    tiles = right.shape[2] // _COLUMNS
    run = -(-tiles // runs)
    runs = -(-tiles // run)

    def body(labels_g, left_g, right_g, out_g, labels_s, out_s, loaded):
        first = lax.axis_index("run") * run
        span = pl.ds(lax.axis_index("token") * rows, rows)
        count = jnp.minimum(run, tiles - first)
        plgpu.copy_gmem_to_smem(labels_g.at[span], labels_s, loaded)
        plgpu.barrier_wait(loaded)
        label = _of_rows(labels_s)

        def sources(step):
            i, j, k = position(lax.rem(step, jnp.int32(passes)), left.shape[2] // CONTRACTION)
            part = pl.ds(k, CONTRACTION)
            column = (first + lax.div(step, jnp.int32(passes))) * _COLUMNS
            return left_g.at[i, span, part], right_g.at[j, part, pl.ds(column, _COLUMNS)]

        def streamed(left_s, right_s, arrived):
            stream = Stream(sources, (left_s, right_s), arrived, count * passes)
            stream.start()

            def one(index, carry):
                column = (first + index) * _COLUMNS
                products = stream.product((rows, _COLUMNS), index * passes, passes, _multiply)
                return _merged(carry, capped(products, softcap)[0], label, column, vocabulary)

            zeros = jnp.zeros(rows, jnp.float32)
            begin = [plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1)) for x in (zeros + _LOWEST, zeros, zeros)]
            return lax.fori_loop(0, count, one, tuple(begin))

        measured = pl.run_scoped(streamed, *_slots(rows, stages, left_g.dtype), barrier(stages))
        for i, vector in enumerate(measured):
            out_s[i] = vector
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_g.at[lax.axis_index("run"), :, span])
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((runs, 3, tokens), jnp.float32),
        grid=(tokens // rows, runs),
        grid_names=("token", "run"),
        scratch_types=[
            plgpu.SMEM((rows,), jnp.int32),
            plgpu.SMEM((3, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
        ],
        interpret=interpreted(simulated),
        kernel_name="linear_cross_entropy",
    )(padded(labels, (rows,)), left, right)
    return tuple(out[:, i, : x.shape[0]] for i in range(3))


def _multiply(acc, step, rows, columns) -> None:
    plgpu.wgmma(acc, rows, columns)


def _merged(carry, logits, label, first, vocabulary: int):
    """The largest logit, the sum of exponentials below it and the label's logit, with one tile more."""
    largest, total, picked = carry
    column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    logits = jnp.where(column < vocabulary - first, logits, jnp.full_like(logits, _LOWEST))
    picked += jnp.sum(jnp.where(_is_label(label, logits.shape, first), logits, jnp.zeros_like(logits)), axis=1)
    new = jnp.maximum(largest, jnp.max(logits, axis=1))
    return new, total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - _across(new, logits.shape)), axis=1), picked


def _pull(options, x, head, labels, of_tokens):
    """The gradient in the products of x and head: [N,C] in x's dtype."""
    rows, stages, _, softcap, simulated = options
    left, right = _operands(x, head, rows)
    shape, passes = (left.shape[1], right.shape[2]), steps(left, x.shape[1])
    columns = shape[1] // _COLUMNS

    def body(labels_g, of_tokens_g, left_g, right_g, dz_g, labels_s, of_tokens_s, loaded):
        column = lax.axis_index("outer") * _INNER + lax.axis_index("inner")
        first, there = column * _COLUMNS, column < columns
        span = pl.ds(lax.axis_index("token") * rows, rows)
        plgpu.copy_gmem_to_smem(labels_g.at[span], labels_s, loaded)
        plgpu.copy_gmem_to_smem(of_tokens_g.at[:, span], of_tokens_s, loaded)
        plgpu.barrier_wait(loaded)

        def sources(step):
            i, j, k = position(step, left.shape[2] // CONTRACTION)
            part = pl.ds(k, CONTRACTION)
            return left_g.at[i, span, part], right_g.at[j, part, pl.ds(first, _COLUMNS)]

        slots = _slots(rows, stages, left_g.dtype)
        products = product((rows, _COLUMNS), sources, _multiply, jnp.where(there, passes, 0), slots)
        label, vectors = _of_rows(labels_s), [_of_rows(of_tokens_s.at[i]) for i in range(3)]

        def part(begin):
            z = products[:, begin : begin + _PART]
            normalisers, pulls, weights = (_across(vector, z.shape) for vector in vectors)
            at_label = jnp.where(_is_label(label, z.shape, first + begin), weights, jnp.zeros_like(weights))
            return pulled(*capped(z, softcap), normalisers, pulls, at_label)

        @pl.when(there)
        def _():
            parts = [functools.partial(part, begin) for begin in range(0, _COLUMNS, _PART)]
            store(dz_g.at[span, pl.ds(first, _COLUMNS)], x.dtype, *parts)

    dz = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(-(-columns // _INNER), shape[0] // rows, min(columns, _INNER)),
        grid_names=("outer", "token", "inner"),
        scratch_types=[
            plgpu.SMEM((rows,), jnp.int32),
            plgpu.SMEM((3, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        interpret=interpreted(simulated),
        kernel_name="linear_cross_entropy_pull",
    )(padded(labels, (rows,)), padded(of_tokens, (rows,)), left, right)
    return dz[: x.shape[0], : head.shape[1]]
