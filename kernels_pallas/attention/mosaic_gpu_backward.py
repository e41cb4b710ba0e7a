"""The backward pass of attention on Hopper: a kernel over tiles of keys, and one over tiles of queries.

Both compute the weights again from the logsumexps. Every gradient is summed by the one warpgroup that owns its rows, in
registers and in a fixed order, also over the query heads that share a head of keys.
"""

from collections.abc import Callable

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
    columns,
    drain,
    fetch,
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


def queries_backward(options: Options, q, k, v, dy, statistics, marks, stretches):
    """dq [B,T,H,K].

    Args:
        q, k, v, marks: as in `forward`. dy: [B,T,H,V] in q's dtype.
        statistics: float32 [B,H,2,T]: logsumexps in base 2, huge where a query sees nothing; sums of dy y less the
            cotangents of the logsumexps.
        stretches: int32 [1|B, T / 128, 6] over tiles of ``options["backward_keys"]`` keys.
    """
    (batch, time, heads, width), value_width = q.shape, v.shape[3]
    keys = options["backward_keys"]
    stages, value_stages = options["backward_stages"], options["backward_value_stages"]
    inputs = {"q": q, "k": k, "v": v, "dy": dy, "statistics": statistics, **marks, "stretches": stretches}
    key_tiles = mark_tiles(marks, KEY_MARKS, stages, keys)
    scratch = {
        "q_tile": tile(CONSUMERS, ROWS, width, dtype=q.dtype),
        "dy_tile": tile(CONSUMERS, ROWS, value_width, dtype=q.dtype),
        "k_tile": tile(stages, keys, width, dtype=q.dtype),
        "v_tile": tile(value_stages, keys, value_width, dtype=q.dtype),
        **key_tiles,
        "staging": tile(CONSUMERS, ROWS, keys, dtype=q.dtype) if options.simulated else None,
        "own": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        **ring("k", stages, 1 + len(key_tiles)),
        **ring("v", value_stages, 1),
    }
    outputs = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    grid = {"head": heads, "tile": time // TILE, "batch": batch}
    name = "attention_backward_queries"
    return launch(lambda refs: _queries_body(options, refs), options, inputs, outputs, scratch, grid, name)[0]


def _queries_body(options: Options, refs):
    batch, head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    index = refs["stretches"].shape[1] - 1 - jax.lax.axis_index("tile")  # the last see most under a causal mask
    schedule = Schedule.read(refs["stretches"], batch, index)
    group = jax.lax.div(head, jnp.int32(refs["q"].shape[2] // refs["k"].shape[2]))

    def copy():
        def step(number, _):
            span = pl.ds(schedule.at(number) * options["backward_keys"], options["backward_keys"])
            fetch(refs, "k", number, {"k": (batch, span, group), **dict.fromkeys(KEY_MARKS, (batch, span))})
            fetch(refs, "v", number, {"v": (batch, span, group)})
            return ()

        jax.lax.fori_loop(0, schedule.steps, step, ())
        drain(refs, "k", schedule.steps)
        drain(refs, "v", schedule.steps)

    def compute(warpgroup):
        query = index * TILE + warpgroup * ROWS
        span = pl.ds(query, ROWS)
        own(refs, {"q": (batch, span, head), "dy": (batch, span, head)}, warpgroup)
        lse, delta = (load(refs["statistics"].at[batch, head, i, span], 0) for i in range(2))
        of_queries = None if refs["query_ids"] is None else load(refs["query_ids"].at[batch, span], 0)
        vectors = lse, delta, of_queries

        def run(sums):
            def step(number, _):
                _queries_step(options, refs, schedule, batch, query, unknown(warpgroup), vectors, sums, number)
                return ()

            jax.lax.fori_loop(0, schedule.steps, step, ())
            return sums[...]

        dq = pl.run_scoped(run, plgpu.ACC((ROWS, refs["q"].shape[3]), jnp.float32)) * options.scale
        store(dq, refs["q_tile"].at[warpgroup], refs["dq"].at[batch, span, head])
        plgpu.wait_smem_to_gmem(0)

    warpgroups(compute, copy)


def _queries_step(options, refs, schedule, batch, query, warpgroup, vectors, sums, number):
    """Add one tile of keys to dq."""
    lse, delta, of_queries = vectors
    keys = options["backward_keys"]
    slot, shape = slot_of(refs, "k", number), (ROWS, keys)
    k_tile = refs["k_tile"].at[slot]
    plgpu.barrier_wait(refs["k_ready"].at[slot])
    products = product(refs["q_tile"].at[warpgroup], k_tile.transpose((1, 0)), shape)
    index = schedule.at(number)

    def ids():
        return of_queries, *key_marks(refs, "_tile", slot, 1)

    place = {"query": query, "key": index * keys, "prefix": _prefix(refs, batch), "axis": 0}
    place["ids"] = None if refs["key_ids"] is None else ids
    _, slopes = _weights(options, products, lambda: rows(lse, shape), schedule, index, place)
    value_slot = slot_of(refs, "v", number)
    plgpu.barrier_wait(refs["v_ready"].at[value_slot])
    dweights = product(refs["dy_tile"].at[warpgroup], refs["v_tile"].at[value_slot].transpose((1, 0)), shape)
    release(refs, "v", value_slot, loaded=False)
    dlogits = (slopes * (dweights - rows(delta, shape))).astype(k_tile.dtype)
    plgpu.wgmma(sums, staged(dlogits, _staging(refs, warpgroup)), k_tile)
    plgpu.wgmma_wait(0)
    release(refs, "k", slot, loaded=refs["key_ids"] is not None)


def keys_backward(options: Options, q, k, v, dy, statistics, marks, stretches, wanted=("dk", "dv")):
    """The `wanted` of dk [B,S,G,K] and dv [B,S,G,V]; arguments as in `queries_backward`.

    Args:
        stretches: int32 [1|B, S / 128, 6] over tiles of ``options["backward_queries"]`` queries.
    """
    (batch, keys, groups, width), value_width = k.shape, v.shape[3]
    queries = options["backward_queries"]
    stages, value_stages = options["backward_stages"], options["backward_value_stages"]
    reads_v, shares = "dk" in wanted, "dk" not in wanted and width == value_width
    inputs = {"q": q, "k": k, "v": v if reads_v else None, "dy": dy, "statistics": statistics}
    inputs |= {**marks, "stretches": stretches}
    query_tiles = mark_tiles(marks, ("query_ids",), stages, queries)
    scratch = {
        "k_tile": tile(CONSUMERS, ROWS, width, dtype=q.dtype),
        "v_tile": None if shares else tile(CONSUMERS, ROWS, value_width, dtype=q.dtype),
        "q_tile": tile(stages, queries, width, dtype=q.dtype),
        "dy_tile": tile(value_stages, queries, value_width, dtype=q.dtype),
        "statistics_tile": plgpu.SMEM((stages, 2, queries), jnp.float32),
        **query_tiles,
        "staging": tile(CONSUMERS, ROWS, queries, dtype=q.dtype) if options.simulated else None,
        "own": plgpu.Barrier(num_arrivals=1 + reads_v, num_barriers=CONSUMERS),
        **ring("q", stages, 2 + len(query_tiles)),
        **ring("dy", value_stages, 1),
    }
    outputs = {name: jax.ShapeDtypeStruct(like.shape, q.dtype) for name, like in (("dk", k), ("dv", v))}
    outputs = {name: outputs[name] for name in wanted}
    grid = {"group": groups, "tile": keys // TILE, "batch": batch}
    name = "attention_backward_" + "_".join(wanted)
    return launch(lambda refs: _keys_body(options, refs, wanted), options, inputs, outputs, scratch, grid, name)


def _keys_body(options: Options, refs, wanted):
    batch, group, index = (jax.lax.axis_index(name) for name in ("batch", "group", "tile"))
    schedule = Schedule.read(refs["stretches"], batch, index)
    members = refs["q"].shape[2] // refs["k"].shape[2]
    queries = options["backward_queries"]

    def over_queries(step):
        """Run step(number, member, tile) over the tiles of all query heads."""

        def member(number, _):
            def one(inner, _):
                step(number * schedule.steps + inner, number, schedule.at(inner))
                return ()

            return jax.lax.fori_loop(0, schedule.steps, one, ())

        jax.lax.fori_loop(0, members, member, ())

    def copy():
        def step(number, member, at):
            span, head = pl.ds(at * queries, queries), group * members + member
            statistics = batch, head, slice(None), span
            places = {"q": (batch, span, head), "statistics": statistics, "query_ids": (batch, span)}
            fetch(refs, "q", number, places)
            fetch(refs, "dy", number, {"dy": (batch, span, head)})

        over_queries(step)
        drain(refs, "q", members * schedule.steps)
        drain(refs, "dy", members * schedule.steps)

    def compute(warpgroup):
        key = index * TILE + warpgroup * ROWS
        span = pl.ds(key, ROWS)
        own(refs, {"k": (batch, span, group), "v": (batch, span, group)}, warpgroup)
        of_keys = key_marks(refs, "", (batch, span), 0)

        def run(**sums):
            def step(number, member, at):
                _keys_step(options, refs, schedule, batch, key, unknown(warpgroup), of_keys, sums, number, at)

            over_queries(step)
            return [sums[name][...] for name in wanted]

        widths = {"dk": refs["k"].shape[3], "dv": refs["dy"].shape[3]}
        results = pl.run_scoped(run, **{name: plgpu.ACC((ROWS, widths[name]), jnp.float32) for name in wanted})
        for name, result in zip(wanted, results, strict=True):
            result = result * options.scale if name == "dk" else result
            store_tile = refs["k_tile"] if name == "dk" or refs["v_tile"] is None else refs["v_tile"]
            store(result, store_tile.at[warpgroup], refs[name].at[batch, span, group])
        plgpu.wait_smem_to_gmem(0)

    warpgroups(compute, copy)


def _keys_step(options, refs, schedule, batch, key, warpgroup, of_keys, sums, number, index):
    """Add one tile of queries to dk and dv."""
    queries = options["backward_queries"]
    slot, value_slot = slot_of(refs, "q", number), slot_of(refs, "dy", number)
    q_tile, dy_tile, staging = refs["q_tile"].at[slot], refs["dy_tile"].at[value_slot], _staging(refs, warpgroup)
    shape = ROWS, queries
    plgpu.barrier_wait(refs["q_ready"].at[slot])
    products = product(refs["k_tile"].at[warpgroup], q_tile.transpose((1, 0)), shape)

    def statistic(number):
        return columns(load(refs["statistics_tile"].at[slot, number], 1), shape)

    def ids():
        return load(refs["query_ids_tile"].at[slot], 1), *of_keys

    place = {"query": index * queries, "key": key, "prefix": _prefix(refs, batch), "axis": 1}
    place["ids"] = None if refs["key_ids"] is None else ids
    # Rounded, as the products take them: the registers do not hold both sums and two wide tiles of logits.
    weights, slopes = (
        x.astype(q_tile.dtype) for x in _weights(options, products, lambda: statistic(0), schedule, index, place)
    )
    plgpu.barrier_wait(refs["dy_ready"].at[value_slot])
    if "dv" in sums:
        plgpu.wgmma(sums["dv"], staged(weights, staging), dy_tile)
    if "dk" in sums:
        dweights = product(refs["v_tile"].at[warpgroup], dy_tile.transpose((1, 0)), shape)
        dlogits = slopes.astype(jnp.float32) * (dweights - statistic(1))
        plgpu.wgmma(sums["dk"], staged(dlogits.astype(q_tile.dtype), staging), q_tile)
    plgpu.wgmma_wait(0)
    release(refs, "dy", value_slot, loaded=False)
    release(refs, "q", slot, loaded=True)


def _weights(options: Options, products, lse: Callable, schedule: Schedule, index, place):
    """The weights of a tile; and these times the slope of the capped logits."""
    logits = hide(options, options.capped(products), schedule, index, **place)
    weights = jnp.exp2(logits * options.base2 - lse())
    return weights, weights if options.softcap is None else weights * (1 - logits * logits)


def _prefix(refs, batch):
    return None if refs["prefix"] is None else refs["prefix"][batch]


def _staging(refs, warpgroup):
    return None if refs["staging"] is None else refs["staging"].at[warpgroup]
