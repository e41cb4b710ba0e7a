"""The forward kernel of fused attention on TPUs: one pass over the visited keys of each block of queries."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.mosaic_tpu_tile import (
    FLOOR,
    LANES,
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
    spread,
)
from kernels_pallas.attention.visits import Visits


def forward(options: Options, listed: Visits, prefix, queries: Marks, keys: Marks, q, k, v, sinks):
    """Outputs and logsumexps of whole blocks.

    Args:
        q: [B, H, T, K]. k: [B, G, S, K]. v: [B, G, S, V]. sinks: [H] or None. prefix: int32 [B] or None.
        listed, queries, keys: the visits by queries, and the marks.

    Returns:
        y [B, H, T, V] in q's dtype; the natural logsumexp of every row, the sink in it, float32 [B, H, 1, T].
    """
    tiles = Tiles.of(options, q, k, listed)
    (batch, heads, time, width), value_width = q.shape, v.shape[-1]
    inputs = {"q": q, "k": k, "v": v}
    specs = {"q": tiles.tokens("query", width), "k": tiles.tokens("key", width), "v": tiles.tokens("key", value_width)}
    if sinks is not None:
        inputs["sinks"] = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (heads, 1, LANES))
        specs["sinks"] = pl.BlockSpec((1, 1, LANES), lambda *ids: (ids[1], 0, 0))
    for name, side, marks in (("query_marks", "query", queries), ("key_marks", "key", keys)):
        if marks.names:
            inputs[name], specs[name] = marks.values, tiles.marks(side, marks)
    block = options.blocks[0]
    scratch = [pltpu.VMEM((block, LANES), jnp.float32)] * 2 + [pltpu.VMEM((block, value_width), jnp.float32)]
    if queries.names:
        scratch.append(pltpu.VMEM((block, len(queries.names)), jnp.int32))
    return pl.pallas_call(
        functools.partial(_body, tiles, queries.names, keys.names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=tiles.grid,
            in_specs=[specs],
            out_specs=[tiles.tokens("query", value_width), tiles.statistics(1)],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, time, value_width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, time), jnp.float32),
        ],
        compiler_params=parameters(tiles),
        interpret=options.simulated,
        name="attention_forward",
    )(*tiles.tables(listed, prefix), inputs)


def _body(tiles, query_names, key_names, *refs):
    """Running maximum and sum (base 2) and mean of the values stay in VMEM while a block's visits follow each other."""
    *tables, inputs, y_ref, logsumexp_ref, largest_ref, total_ref, mean_ref = refs[:10]
    columns = refs[10:]
    options, visit = tiles.options, tiles.visit(*tables)
    block, key_block = options.blocks

    @pl.when(visit.first)
    def _():
        start = jnp.full(largest_ref.shape, FLOOR, jnp.float32)
        if "sinks" in inputs:
            sink = jnp.broadcast_to(inputs["sinks"][0] * LOG2_E, largest_ref.shape)
            start = jnp.maximum(start, sink)
            total_ref[...] = jnp.exp2(sink - start)
        else:
            total_ref[...] = jnp.zeros_like(total_ref)
        largest_ref[...] = start
        mean_ref[...] = jnp.zeros_like(mean_ref)
        for column in columns:
            column[...] = inputs["query_marks"][0].T

    def step(mask):
        v = inputs["v"][0, 0]
        values, _ = logits(options, inputs["q"][0, 0], inputs["k"][0, 0])
        if mask:
            queries = in_columns(query_names, *columns or (None,), block)
            keys = in_rows(key_names, inputs.get("key_marks"), key_block)
            values = masked(options, values, visit.tile, visit.prefix, queries, keys)
        before = largest_ref[...]
        largest = jnp.maximum(before, jnp.max(values, axis=1, keepdims=True))
        weights = jnp.exp2(values - spread(largest, key_block))
        kept = jnp.exp2(before - largest)
        largest_ref[...] = largest
        total_ref[...] = kept * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        added = product(weights.astype(v.dtype), v, (1, 0))
        mean_ref[...] = spread(kept, mean_ref.shape[1]) * mean_ref[...] + added

    visit.run(step)

    @pl.when(visit.last)
    def _():
        total = total_ref[...]
        total = jnp.where(total == 0, 1, total)
        y_ref[0, 0] = (mean_ref[...] / spread(total, mean_ref.shape[1])).astype(y_ref.dtype)
        logsumexp_ref[0, 0] = ((largest_ref[...] + jnp.log2(total)) / LOG2_E).T[:1]
