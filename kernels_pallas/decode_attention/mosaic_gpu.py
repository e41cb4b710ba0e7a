"""Decoding on Hopper GPUs: a block of threads for every row, group and part of the cache; parts are merged after.

A warpgroup holds the queries of all heads of a group, filled up to the 64 rows of a product, and reads the keys and
values of its part once, several tiles ahead. The matrix units wait for memory, whatever rows they multiply in vain.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.mosaic_gpu_tiles import (
    LAYOUT,
    MASKED,
    ROWS,
    columns,
    fill,
    launch,
    load,
    product,
    rows,
    staged,
    tile,
    unknown,
)
from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.decode_attention.cache import Cache, merged
from kernels_pallas.dispatch import unfit

_MULTIPROCESSORS = 132
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static: of the call, and `slots` of a tile, read in pieces of `piece`, `stages` of them on their way."""

    time: int
    window: int | None
    scale: float
    softcap: float | None
    slots: int
    piece: int
    stages: int
    parts: int
    simulated: bool


def obstacles(q, cache: Cache) -> list[str]:
    """What of this call the kernel cannot honour, in words; empty if it can run."""
    (_, time, heads, width), (_, page, groups, value_width) = q.shape, cache.v.shape
    paged = cache.page_table is not None
    checks = {
        f"dtypes {q.dtype}, {cache.k.dtype}, {cache.v.dtype}": not q.dtype == cache.k.dtype == cache.v.dtype,
        f"head size {width}, {value_width}": any(n % 64 or n > 256 for n in (width, value_width)),
        f"{time * heads // groups} queries of a group": time * heads // groups > ROWS,
        f"pages of {page} slots": paged and (page % 8 != 0 or (page & (page - 1) and page % 64)),
    }
    return unfit({"q": q}, "bfloat16", "float16") + [name for name, fails in checks.items() if fails]


CHOICES = {"slots": (64, 128), "stages": (2, 3, 4), "parts": (1, 2, 4, 8, 16, 32)}
"""Block sizes that tuning tries."""


def heuristic(q, cache: Cache) -> dict[str, int]:
    """Tiles of 64 slots, and parts for two blocks of threads on each of the 132 multiprocessors.

    It rests on memory alone: by Little's law 4.8 TB/s at a microsecond take 36 KiB on their way to each of them. Two
    tiles at a time (four of narrow heads, of 16 KiB each) let two blocks share the memory of a multiprocessor.
    """
    batch, groups, slots = q.shape[0], cache.k.shape[2], 64
    stages = 4 if max(cache.k.shape[3], cache.v.shape[3]) <= 64 else 2
    wanted = -(-2 * _MULTIPROCESSORS // (batch * groups))
    return {"slots": slots, "stages": stages, "parts": max(1, min(wanted, cache.slots // slots))}


def decode_attention(
    q: jax.Array,
    cache: Cache,
    sinks: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: dict[str, int],
    simulated: bool,
) -> jax.Array:
    """q [B,T,H,K], sinks [H] or None -> [B,T,H,V] in q's dtype.

    Args:
        blocks: "slots" of a tile (64 or 128), "stages", "parts" of a row.
    """
    (batch, time, heads, width), groups = q.shape, cache.k.shape[2]
    members, slots = heads // groups, blocks["slots"]
    piece = slots if cache.page_table is None else math.gcd(slots, cache.k.shape[1])
    options = _Options(time, window, scale, softcap, slots, piece, blocks["stages"], blocks["parts"], simulated)
    queries = q.reshape(batch, time, groups, members, width).swapaxes(1, 2).reshape(batch, groups, -1, width)
    means, logsumexps = _parts(options, queries, cache)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(groups, members), (1, time))
    y = merged(means[..., : time * members, :], logsumexps[..., : time * members], sinks, axis=2)
    y = y.reshape(batch, groups, time, members, -1).swapaxes(1, 2)
    return y.reshape(batch, time, heads, -1).astype(q.dtype)


def _parts(options: _Options, queries, cache: Cache):
    """queries [B, G, T * R, K] -> means float32 [B, G, parts, n, V] and logsumexps [B, G, parts, n], n >= T * R."""
    (batch, groups, count, width), value_width = queries.shape, cache.v.shape[3]
    written = -(-count // 8) * 8
    visible = cache.visible
    if visible is not None:
        visible = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, -cache.slots % options.slots)))
    table = cache.page_table
    inputs = {
        "q": jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - count), (0, 0))),
        "k": cache.k,
        "v": cache.v,
        "lengths": cache.lengths.astype(jnp.int32),
        "table": None if table is None else table.astype(jnp.int32),
        "visible": visible,
    }
    outputs = {
        "means": jax.ShapeDtypeStruct((batch, groups, options.parts, written, value_width), jnp.float32),
        "lse": jax.ShapeDtypeStruct((batch, groups, options.parts, written), jnp.float32),
    }
    stages, slots, dtype = options.stages, options.slots, queries.dtype
    copies = 2 * (slots // options.piece) + (visible is not None)
    scratch = {
        "q_tile": tile(ROWS, width, dtype=dtype),
        "k_tile": tile(stages, slots, width, dtype=dtype),
        # The sums leave by way of the values' memory, so that two blocks of threads fit.
        "v_and_mean": plgpu.RefUnion(
            tile(stages, slots, value_width, dtype=dtype), plgpu.SMEM((ROWS, value_width), jnp.float32)
        ),
        "visible_tile": None if visible is None else plgpu.SMEM((stages, slots), jnp.int32),
        "p_tile": tile(ROWS, slots, dtype=dtype) if options.simulated else None,
        "lse_tile": plgpu.SMEM((ROWS,), jnp.float32),
        "own": plgpu.Barrier(num_arrivals=1),
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    }
    grid = {"part": options.parts, "group": groups, "row": batch}
    members = count // options.time

    def body(refs):
        v_tile, mean_tile = refs["v_and_mean"]
        _body(options, members, written, {**refs, "v_tile": v_tile, "mean_tile": mean_tile})

    return launch(body, options, inputs, outputs, scratch, grid, "decode_attention", threads=1)


def _body(options: _Options, members: int, written: int, refs):
    row, group, part = (jax.lax.axis_index(name) for name in ("row", "group", "part"))
    length = refs["lengths"][row]
    start, count = _range(options, length, part)
    plgpu.copy_gmem_to_smem(refs["q"].at[row, group], refs["q_tile"], refs["own"])
    for stage in range(options.stages):

        @pl.when(stage < count)
        def _(stage=stage):
            _fetch(options, refs, row, group, length, start + stage, stage)

    plgpu.barrier_wait(refs["own"])
    carry = fill((ROWS, refs["v"].shape[3]), 0.0), fill((ROWS,), NOTHING), fill((ROWS,), 0.0)

    def step(number, carry):
        slot = unknown(jax.lax.rem(number, jnp.int32(options.stages)))
        plgpu.barrier_wait(refs["ready"].at[slot])
        carry = _step(options, members, refs, length, start + number, slot, carry)
        plgpu.commit_smem()  # every warp has read the tile

        @pl.when(number + options.stages < count)
        def _():
            _fetch(options, refs, row, group, length, start + number + options.stages, slot)

        return carry

    sums, largest, total = jax.lax.fori_loop(0, count, step, carry)
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    refs["mean_tile"][...] = sums * rows(1 / total, sums.shape)
    refs["lse_tile"][...] = jnp.where(nothing, NOTHING, (largest + jnp.log2(total)) / _LOG2_E)
    plgpu.commit_smem()
    for name, value in (("mean_tile", "means"), ("lse_tile", "lse")):
        plgpu.copy_smem_to_gmem(refs[name].at[pl.ds(0, written)], refs[value].at[row, group, part])
    plgpu.wait_smem_to_gmem(0)


def _range(options: _Options, length, part):
    """The first tile of a part and how many it has, of the tiles in which some query sees something."""
    slots, parts = jnp.int32(options.slots), jnp.int32(options.parts)
    first = jnp.int32(0)
    if options.window is not None:
        first = jax.lax.div(jnp.maximum(length - options.time - options.window + 1, 0), slots)
    end = jax.lax.div(length + slots - 1, slots)
    each = jax.lax.div(end - first + parts - 1, parts)
    start = first + part * each
    return start, jnp.clip(end - start, 0, each)


def _fetch(options: _Options, refs, row, group, length, index, stage):
    """Copy a tile; of a paged cache page by page, the last page that holds a token for those beyond it."""
    ready, first = refs["ready"].at[stage], index * options.slots
    for begin in range(0, options.slots, options.piece):
        source, at = row, first + begin
        if refs["table"] is not None:
            page = jnp.int32(refs["k"].shape[1])
            at = jnp.minimum(at, jax.lax.div(length - 1, jnp.int32(options.piece)) * options.piece)
            source, at = refs["table"][row, jax.lax.div(at, page)], jax.lax.rem(at, page)
        span, place = pl.ds(at, options.piece), pl.ds(begin, options.piece)
        for name in ("k", "v"):
            plgpu.copy_gmem_to_smem(refs[name].at[source, span, group], refs[f"{name}_tile"].at[stage, place], ready)
    if refs["visible"] is not None:
        span = pl.ds(first, options.slots)
        plgpu.copy_gmem_to_smem(refs["visible"].at[row, span], refs["visible_tile"].at[stage], ready)


def _step(options: _Options, members: int, refs, length, index, slot, carry):
    """One tile: the weighted sums of values, the largest logits and the sums of weights of 64 rows."""
    sums, largest, total = carry
    shape = ROWS, options.slots
    values = product(refs["q_tile"], refs["k_tile"].at[slot].transpose((1, 0)), shape)
    if options.softcap is None:
        values = values * (options.scale * _LOG2_E)
    else:  # not the hardware's tanh, which errs by 5e-4
        rate = 2 * _LOG2_E * options.scale / options.softcap
        values = options.softcap * _LOG2_E * (1 - 2 * (1 / (1 + jnp.exp2(values * rate))))
    values = jnp.where(_seen(options, members, refs, length - index * options.slots, slot, shape), values, MASKED)
    new = jnp.maximum(largest, jnp.max(values, axis=1))
    kept, weights = jnp.exp2(largest - new), jnp.exp2(values - rows(new, shape))
    total = kept * total + jnp.sum(weights, axis=1)
    sums, narrow, v = rows(kept, sums.shape) * sums, weights.astype(refs["v"].dtype), refs["v_tile"].at[slot]
    if options.simulated:
        return sums + product(staged(narrow, refs["p_tile"]), v, sums.shape), new, total
    return pl.run_state(lambda sums: plgpu.wgmma(sums, narrow, v))(plgpu.ACC.init(sums)), new, total


def _seen(options: _Options, members: int, refs, left, slot, shape):
    """Bool [rows, slots]; `left` is how many of the row's slots there are from the tile's first on."""
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT)
    limit = left
    if options.time > 1:
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT)
        limit = left - options.time + 1 + jax.lax.div(row, jnp.int32(members))
    seen = key < limit
    if options.window is not None:
        seen &= key >= limit - options.window
    if refs["visible"] is not None:
        seen &= columns(load(refs["visible_tile"].at[slot], 1), shape) != 0
    return seen
