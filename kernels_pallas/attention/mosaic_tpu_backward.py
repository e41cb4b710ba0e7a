"""The backward kernels of fused attention on TPUs: one over blocks of queries, one over blocks of keys.

With P the weights and Δ the row sums of dO∘O, minus the cotangent of the logsumexp: dS = P∘(dO Vᵀ − Δ) times the slope
of the logits, dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO (arXiv 2205.14135). The kernel over keys makes its tiles transposed, so
that no matmul has to turn one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.mosaic_tpu_tile import (
    LOG2_E,
    Marks,
    Options,
    Tiles,
    in_columns,
    in_rows,
    logits,
    masked,
    parameters,
    product,
)
from kernels_pallas.attention.visits import Visits


def query_gradient(options: Options, listed: Visits, prefix, queries: Marks, keys: Marks, q, k, v, dy, statistics):
    """dQ [B, H, T, K] in q's dtype.

    Args:
        q, k, v, prefix, listed, queries, keys: as in `forward`. dy: [B, H, T, V].
        statistics: float32 [B, H, 2, T], of every row the logsumexp and Δ.
    """
    tiles = Tiles.of(options, q, k, listed)
    inputs, specs = _operands(tiles, queries, keys, q, k, v, dy, statistics)
    block = options.blocks[0]
    scratch = [pltpu.VMEM((block, q.shape[3]), jnp.float32), pltpu.VMEM((block, 2), jnp.float32)]
    if queries.names:
        scratch.append(pltpu.VMEM((block, len(queries.names)), jnp.int32))
    return pl.pallas_call(
        functools.partial(_query_body, tiles, queries.names, keys.names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=tiles.grid,
            in_specs=[specs],
            out_specs=tiles.tokens("query", q.shape[3]),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=parameters(tiles),
        interpret=options.simulated,
        name="attention_query_gradient",
    )(*tiles.tables(listed, prefix), inputs)


def key_gradient(options: Options, listed: Visits, prefix, queries: Marks, keys: Marks, q, k, v, dy, statistics):
    """dK [B, G, S, K] and dV [B, G, S, V] in the dtypes of k and v, summed over the heads of each group.

    `listed` are the visits by keys; others as in `query_gradient`.
    """
    tiles = Tiles.of(options, q, k, listed, by_key=True)
    inputs, specs = _operands(tiles, queries, keys, q, k, v, dy, statistics)
    block = options.blocks[1]
    scratch = [pltpu.VMEM((block, x.shape[3]), jnp.float32) for x in (k, v)]
    if keys.names:
        scratch.append(pltpu.VMEM((block, len(keys.names)), jnp.int32))
    return pl.pallas_call(
        functools.partial(_key_body, tiles, queries.names, keys.names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=tiles.grid,
            in_specs=[specs],
            out_specs=[tiles.tokens("key", x.shape[3]) for x in (k, v)],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=parameters(tiles),
        interpret=options.simulated,
        name="attention_key_gradient",
    )(*tiles.tables(listed, prefix), inputs)


def _operands(tiles: Tiles, queries: Marks, keys: Marks, q, k, v, dy, statistics):
    inputs = {"q": q, "k": k, "v": v, "dy": dy, "statistics": statistics}
    specs = {
        "q": tiles.tokens("query", q.shape[3]),
        "k": tiles.tokens("key", k.shape[3]),
        "v": tiles.tokens("key", v.shape[3]),
        "dy": tiles.tokens("query", v.shape[3]),
        "statistics": tiles.statistics(2),
    }
    for name, side, marks in (("query_marks", "query", queries), ("key_marks", "key", keys)):
        if marks.names:
            inputs[name], specs[name] = marks.values, tiles.marks(side, marks)
    return inputs, specs


def _query_body(tiles, query_names, key_names, *refs):
    *tables, inputs, dq_ref, total_ref, statistics_ref = refs[:8]
    columns = refs[8:]
    options, visit = tiles.options, tiles.visit(*tables)

    @pl.when(visit.first)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)
        statistics_ref[...] = inputs["statistics"][0, 0].T
        for column in columns:
            column[...] = inputs["query_marks"][0].T

    def step(mask):
        k, v, dy = inputs["k"][0, 0], inputs["v"][0, 0], inputs["dy"][0, 0]
        values, slope = logits(options, inputs["q"][0, 0], k)
        if mask:
            queries = in_columns(query_names, *columns or (None,), options.blocks[0])
            keys = in_rows(key_names, inputs.get("key_marks"), options.blocks[1])
            values = masked(options, values, visit.tile, visit.prefix, queries, keys)
        weights = jnp.exp2(values - LOG2_E * statistics_ref[:, :1])
        changes = weights * (product(dy, v, (1, 1)) - statistics_ref[:, 1:])
        changes = changes if slope is None else changes * slope
        total_ref[...] += product(changes.astype(k.dtype), k, (1, 0))

    visit.run(step)

    @pl.when(visit.last)
    def _():
        dq_ref[0, 0] = (options.scale * total_ref[...]).astype(dq_ref.dtype)


def _key_body(tiles, query_names, key_names, *refs):
    *tables, inputs, dk_ref, dv_ref, key_total_ref, value_total_ref = refs[:9]
    columns = refs[9:]
    options, visit = tiles.options, tiles.visit(*tables)

    @pl.when(visit.first)
    def _():
        key_total_ref[...] = jnp.zeros_like(key_total_ref)
        value_total_ref[...] = jnp.zeros_like(value_total_ref)
        for column in columns:
            column[...] = inputs["key_marks"][0].T

    def step(mask):
        q, v, dy = inputs["q"][0, 0], inputs["v"][0, 0], inputs["dy"][0, 0]
        values, slope = logits(options, inputs["k"][0, 0], q)
        if mask:
            queries = in_rows(query_names, inputs.get("query_marks"), options.blocks[0])
            keys = in_columns(key_names, *columns or (None,), options.blocks[1])
            values = masked(options, values, visit.tile, visit.prefix, queries, keys)
        logsumexp, delta = (inputs["statistics"][0, 0, pl.ds(i, 1), :] for i in range(2))
        weights = jnp.exp2(values - LOG2_E * logsumexp)
        value_total_ref[...] += product(weights.astype(dy.dtype), dy, (1, 0))
        changes = weights * (product(v, dy, (1, 1)) - delta)
        changes = changes if slope is None else changes * slope
        key_total_ref[...] += product(changes.astype(q.dtype), q, (1, 0))

    visit.run(step)

    @pl.when(visit.last)
    def _():
        dk_ref[0, 0] = (options.scale * key_total_ref[...]).astype(dk_ref.dtype)
        dv_ref[0, 0] = value_total_ref[...].astype(dv_ref.dtype)
