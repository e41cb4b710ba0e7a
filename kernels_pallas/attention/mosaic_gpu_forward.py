"""The forward pass of attention on Hopper.

A block computes 128 queries of a head: two warpgroups of 64 each, while a third copies the tiles of keys and values
that they share. The two take turns, so that one's products run beside the other's exponentials (arXiv 2407.08608).
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.mosaic_gpu_tiles import (
    CONSUMERS,
    KEY_MARKS,
    ROWS,
    TILE,
    Options,
    Schedule,
    drain,
    fetch,
    fill,
    hide,
    key_marks,
    launch,
    load,
    mark_tiles,
    own,
    product,
    release,
    ring,
    rows,
    slot_of,
    staged,
    store,
    tile,
    unknown,
    warpgroups,
)
from kernels_pallas.attention.reference import NOTHING


def forward(options: Options, q, k, v, sinks, marks, stretches):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] filled to whole tiles, widths multiples of 64.

    Args:
        sinks: float32 [H], in base 2, or None.
        marks: "prefix" int32 [B], "query_ids" [B,T], and `KEY_MARKS` [B,S], each None unless there are any.
        stretches: int32 [1|B, T / 128, 6], see `visits.stretches`.

    Returns:
        y [B,T,H,V] in q's dtype and logsumexps float32 [B,H,T].
    """
    (batch, time, heads, width), value_width = q.shape, v.shape[3]
    keys, stages = options["keys"], options["stages"]
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks, **marks, "stretches": stretches}
    outputs = {
        "y": jax.ShapeDtypeStruct((batch, time, heads, value_width), q.dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, time), jnp.float32),
    }
    key_tiles = mark_tiles(marks, KEY_MARKS, stages, keys)
    scratch = {
        "q_tile": tile(CONSUMERS, ROWS, width, dtype=q.dtype),
        "k_tile": tile(stages, keys, width, dtype=q.dtype),
        "v_tile": tile(stages, keys, value_width, dtype=q.dtype),
        "y_tile": None if width == value_width else tile(CONSUMERS, ROWS, value_width, dtype=q.dtype),
        "p_tile": tile(CONSUMERS, ROWS, keys, dtype=q.dtype) if options.simulated else None,
        "lse_tile": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        **key_tiles,
        "own": plgpu.Barrier(num_barriers=CONSUMERS),
        **ring("k", stages, 1 + len(key_tiles)),
        **ring("v", stages, 1),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    grid = {"head": heads, "tile": time // TILE, "batch": batch}
    return launch(lambda refs: _body(options, refs), options, inputs, outputs, scratch, grid, "attention_forward")


def _body(options: Options, refs):
    batch, head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    # Under a causal mask the last queries see most: they start first.
    index = refs["stretches"].shape[1] - 1 - jax.lax.axis_index("tile")
    schedule = Schedule.read(refs["stretches"], batch, index)
    warpgroups(
        lambda warpgroup: _compute(options, refs, schedule, batch, head, index * TILE + warpgroup * ROWS, warpgroup),
        lambda: _copy(options, refs, schedule, batch, head),
    )


def _copy(options: Options, refs, schedule: Schedule, batch, head):
    group = jax.lax.div(head, jnp.int32(refs["q"].shape[2] // refs["k"].shape[2]))

    def step(number, _):
        span = pl.ds(schedule.at(number) * options["keys"], options["keys"])
        fetch(refs, "k", number, {"k": (batch, span, group), **dict.fromkeys(KEY_MARKS, (batch, span))})
        fetch(refs, "v", number, {"v": (batch, span, group)})
        return ()

    jax.lax.fori_loop(0, schedule.steps, step, ())
    drain(refs, "k", schedule.steps)
    drain(refs, "v", schedule.steps)


def _compute(options: Options, refs, schedule: Schedule, batch, head, query, warpgroup):
    q_tile, value_width, span = refs["q_tile"].at[warpgroup], refs["v"].shape[3], pl.ds(query, ROWS)
    own(refs, {"q": (batch, span, head)}, warpgroup)
    of_queries = None if refs["query_ids"] is None else load(refs["query_ids"].at[batch, span], 0)

    def take_turn():
        plgpu.barrier_arrive(refs["turn"])
        plgpu.barrier_wait(refs["turn"])

    sink = None if refs["sinks"] is None else refs["sinks"][head]
    largest = fill((ROWS,), NOTHING if sink is None else sink)
    carry = fill((ROWS, value_width), 0.0), largest, fill((ROWS,), 0.0 if sink is None else 1.0)
    pl.when(warpgroup == 1)(take_turn)

    def step(number, carry):
        here = unknown(warpgroup)
        return _step(options, refs, schedule, batch, query, here, of_queries, take_turn, number, carry)

    sums, largest, total = jax.lax.fori_loop(0, schedule.steps, step, carry)
    pl.when(warpgroup == 0)(take_turn)
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    y_tile = q_tile if refs["y_tile"] is None else refs["y_tile"].at[warpgroup]
    lse_tile = refs["lse_tile"].at[warpgroup]
    lse_tile[...] = jnp.where(nothing, NOTHING, (largest + jnp.log2(total)) * math.log(2))
    store(sums * rows(1 / total, sums.shape), y_tile, refs["y"].at[batch, span, head])
    plgpu.copy_smem_to_gmem(lse_tile, refs["lse"].at[batch, head, span])
    plgpu.wait_smem_to_gmem(0)


def _step(options, refs, schedule, batch, query, warpgroup, of_queries, take_turn, number, carry):
    """One tile of keys: the weighted sums of values, the largest logits and the sums of weights of 64 queries."""
    sums, largest, total = carry
    keys, slot = options["keys"], slot_of(refs, "k", number)
    shape, index = (ROWS, keys), schedule.at(number)
    prefix = None if refs["prefix"] is None else refs["prefix"][batch]

    def ids():
        return of_queries, *key_marks(refs, "_tile", slot, 1)

    plgpu.barrier_wait(refs["k_ready"].at[slot])
    logits = product(refs["q_tile"].at[warpgroup], refs["k_tile"].at[slot].transpose((1, 0)), shape, take_turn)
    place = {"query": query, "key": index * keys, "prefix": prefix, "axis": 0}
    place["ids"] = None if refs["key_ids"] is None else ids
    logits = hide(options, options.capped(logits), schedule, index, **place)
    release(refs, "k", slot, loaded=refs["key_ids"] is not None)
    now = jnp.maximum(largest, jnp.max(logits, axis=1) * options.base2)
    weights = jnp.exp2(logits * options.base2 - rows(now, shape))
    shrink = jnp.exp2(largest - now)
    total = total * shrink + jnp.sum(weights, axis=1)
    sums = sums * rows(shrink, sums.shape)
    narrow = weights.astype(refs["v"].dtype)
    plgpu.barrier_arrive(refs["turn"])
    plgpu.barrier_wait(refs["v_ready"].at[slot])
    plgpu.barrier_wait(refs["turn"])
    values = refs["v_tile"].at[slot]
    if options.simulated:
        sums = sums + product(staged(narrow, refs["p_tile"].at[warpgroup]), values, sums.shape)
    else:
        sums = pl.run_state(lambda sums: plgpu.wgmma(sums, narrow, values))(plgpu.ACC.init(sums))
    release(refs, "v", slot, loaded=False)
    return sums, now, total
