"""Decoding on TPUs: one pass over the pages or blocks of a row, all its heads and groups at once.

Slots and groups of the cache are one axis, so that memory is read as it lies: [slots * G, K]. Every head's query meets
the keys of all groups, of which a mask leaves its own. That multiplies products by G, which costs nothing: the matrix
unit takes as long to take up a tile of keys as to multiply it with a few more rows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.mosaic_tpu_tile import (
    FLOOR,
    LANES,
    LOG2_E,
    MASKED,
    VMEM_BYTES,
    logits,
    product,
    spread,
)
from kernels_pallas.decode_attention.cache import Cache, merged
from kernels_pallas.dispatch import unfit

_MOST_ROWS = 256
"""Queries times heads: more would fill fast memory with logits."""
_MOST_PAGES = 16
"""Of a step: each is a load of its own."""
_TABLE_BYTES = 512 * 1024
"""Of the scalar memory, which has 1 MiB."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static: of the call, and `pages` of `slots` slots that a step reads, in `steps` of each of `parts`.

    `whole`: no block reaches beyond the cache.
    """

    time: int
    groups: int
    window: int | None
    scale: float
    softcap: float | None
    pages: int
    slots: int
    parts: int
    steps: int
    whole: bool


def obstacles(q, cache: Cache) -> list[str]:
    """What of this call the kernel cannot honour, in words; empty if it can run."""
    (batch, time, heads, width), value_width = q.shape, cache.v.shape[3]
    page, paged = cache.k.shape[1], cache.page_table is not None
    checks = {
        f"dtypes {q.dtype}, {cache.k.dtype}, {cache.v.dtype}": not q.dtype == cache.k.dtype == cache.v.dtype,
        f"head size {max(width, value_width)}": max(width, value_width) > 256,
        f"{time * heads} queries of a row": time * heads > _MOST_ROWS,
        f"pages of {page} slots": paged and page % 8 != 0,
        f"tables of {cache.slots // page} pages in {batch} rows": paged and 4 * cache.page_table.size > _TABLE_BYTES,
    }
    return unfit({"q": q}, "float32", "bfloat16") + [name for name, fails in checks.items() if fails]


CHOICES = {"slots": (128, 256, 512, 1024), "parts": (1, 2)}
"""Block sizes that tuning tries."""


def heuristic(q, cache: Cache) -> dict[str, int]:
    """Slots that a step reads: 4096 vectors of keys, 2048 of wide ones, which takes 1 MiB in bfloat16.

    It rests on fast memory alone: keys and values, two of each on their way, and logits of every head. Two parts where
    there is a single row, so that chips of two cores have work for both.
    """
    wide = max(cache.k.shape[3], cache.v.shape[3]) > 128
    return {"slots": max(8, (2048 if wide else 4096) // cache.k.shape[2]), "parts": 2 if q.shape[0] == 1 else 1}


def decode_attention(
    q: jax.Array,
    cache: Cache,
    sinks: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: dict[str, int],
    simulated: bool | pltpu.InterpretParams,
) -> jax.Array:
    """q [B,T,H,K], sinks [H] or None -> [B,T,H,V] in q's dtype.

    Args:
        blocks: "slots" of a step (whole pages, at most 16, or a multiple of 128) and "parts" of a row.
        simulated: run in the interpreter, with `InterpretParams` in the one that simulates the chip's memories.
    """
    (batch, time, heads, _), groups = q.shape, cache.k.shape[2]
    paged = cache.page_table is not None
    slots = cache.k.shape[1] if paged else min(-(-blocks["slots"] // LANES), -(-cache.slots // LANES)) * LANES
    pages = max(1, min(blocks["slots"] // slots, _MOST_PAGES, cache.page_table.shape[1])) if paged else 1
    reach = cache.slots if window is None else min(cache.slots, window + time + pages * slots - 2)
    steps = math.ceil(math.ceil(reach / (pages * slots)) / blocks["parts"])
    whole = paged or cache.slots % slots == 0
    options = _Options(time, groups, window, scale, softcap, pages, slots, blocks["parts"], steps, whole)
    means, logsumexps = _parts(options, q, cache, simulated)
    sinks = None if sinks is None else jnp.tile(sinks.astype(jnp.float32), time)
    y = merged(means, logsumexps, sinks, axis=1)
    return y.reshape(batch, time, heads, -1).astype(q.dtype)


def _parts(options: _Options, q, cache: Cache, simulated):
    """Means float32 [B, parts, T * H, V] and logsumexps [B, parts, T * H]."""
    (batch, time, heads, width), value_width = q.shape, cache.v.shape[3]
    rows = time * heads
    filled = -(-rows // 16) * 16
    vectors = options.slots * options.groups
    table = jnp.zeros((batch, 1), jnp.int32) if cache.page_table is None else cache.page_table.astype(jnp.int32)

    def block(page):
        def index(row, part, step, lengths, table):
            first, last = _range(options, lengths[row])
            tile, _ = _tile(first, last, part, step, options.parts)
            at = jnp.minimum(
                tile * options.pages + page, jax.lax.div(jnp.maximum(lengths[row] - 1, 0), jnp.int32(options.slots))
            )
            return (row, at, 0) if cache.page_table is None else (table[row * cache.page_table.shape[1] + at], 0, 0)

        return index

    def flat(values, width):
        """Blocks of a cache whose slots and groups are one axis, one for each page of a step."""
        specs = [pl.BlockSpec((1, vectors, width), block(page)) for page in range(options.pages)]
        return [values.reshape(values.shape[0], -1, width)] * options.pages, specs

    (keys, key_specs), (values, value_specs) = flat(cache.k, width), flat(cache.v, value_width)
    inputs, specs = {"k": keys, "v": values}, {"k": key_specs, "v": value_specs}
    inputs["q"] = jnp.pad(q.reshape(batch, rows, width), ((0, 0), (0, filled - rows), (0, 0)))
    specs["q"] = pl.BlockSpec((1, filled, width), lambda row, *_: (row, 0, 0))
    row, vector = jnp.arange(filled, dtype=jnp.int32)[:, None], jnp.arange(options.pages * vectors, dtype=jnp.int32)
    own = row % heads // (heads // options.groups)
    inputs["rows"] = jnp.concatenate([own, row // heads], axis=1)
    inputs["vectors"] = jnp.stack([vector % options.groups, vector // options.groups])
    for name in ("rows", "vectors"):
        specs[name] = pl.BlockSpec(inputs[name].shape, lambda *_: (0, 0))
    if cache.visible is not None:
        inputs["visible"], specs["visible"], inputs["repeat"] = _visible(options, cache)
        specs["repeat"] = pl.BlockSpec(inputs["repeat"].shape, lambda *_: (0, 0))
    outputs = (batch, options.parts, filled)
    means, logsumexps = pl.pallas_call(
        functools.partial(_body, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, options.parts, options.steps),
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec((1, 1, filled, value_width), lambda row, part, *_: (row, part, 0, 0)),
                pl.BlockSpec((1, 1, 1, filled), lambda row, part, *_: (row, part, 0, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((filled, n), jnp.float32) for n in (LANES, LANES, value_width)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*outputs, value_width), jnp.float32),
            jax.ShapeDtypeStruct((*outputs[:2], 1, filled), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=simulated,
        name="decode_attention",
    )(cache.lengths.astype(jnp.int32), table.reshape(-1), inputs)
    return means[:, :, :rows], logsumexps[:, :, 0, :rows]


def _range(options: _Options, length):
    """The first of the tiles that a row needs, and the one after its last; a tile is what a step reads."""
    size = options.pages * options.slots
    first = 0 if options.window is None else jnp.maximum(length - options.time - options.window + 1, 0)
    return jax.lax.div(jnp.int32(first), jnp.int32(size)), jax.lax.div(length + size - 1, jnp.int32(size))


def _tile(first, last, part, step, parts: int):
    """The tile of a step, that of the last step with work where there is none; and whether there is work."""
    each = jax.lax.div(last - first + parts - 1, jnp.int32(parts))
    number = part * each + jnp.clip(step, 0, jnp.maximum(each - 1, 0))
    work = (step < each) & (first + number < last)
    return jnp.minimum(first + number, jnp.maximum(last - 1, first)), work


def _visible(options: _Options, cache: Cache):
    """The mask of slots in blocks of a step, and what repeats it for every group: one as [n, c], [c, c * G] zeros and
    ones. A repeated mask in memory would take up 16 times the room."""
    size = options.pages * options.slots
    count = size if size < LANES else math.gcd(size, LANES)
    values = jnp.pad(cache.visible.astype(jnp.bfloat16), ((0, 0), (0, -cache.slots % size)))
    values = values.reshape(len(values), -1, size // count, count)
    repeat = jnp.repeat(jnp.eye(count, dtype=jnp.bfloat16), options.groups, axis=1)

    def index(row, part, step, lengths, table):
        return row, _tile(*_range(options, lengths[row]), part, step, options.parts)[0], 0, 0

    return values, pl.BlockSpec((1, 1, *values.shape[2:]), index), repeat


def _body(options: _Options, lengths, table, inputs, means_ref, logsumexp_ref, largest_ref, total_ref, mean_ref):
    del table  # for the index maps
    row, part, step = (pl.program_id(axis) for axis in range(3))
    length = lengths[row]
    tile, work = _tile(*_range(options, length), part, step, options.parts)

    @pl.when(step == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        mean_ref[...] = jnp.zeros_like(mean_ref)

    @pl.when(work)
    def _():
        k, v = (jnp.concatenate([page[0] for page in inputs[name]], axis=0) for name in ("k", "v"))
        values = jnp.where(_seen(options, length, tile, inputs), logits(options, inputs["q"][0], k)[0], MASKED)
        if not options.whole:  # the last block reaches beyond the cache, where anything may be
            left = (length - tile * options.slots) * options.groups
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (len(v), 1), 0) < left, v, 0)
        before = largest_ref[...]
        largest = jnp.maximum(before, jnp.max(values, axis=1, keepdims=True))
        weights = jnp.exp2(values - spread(largest, values.shape[1]))
        kept = jnp.exp2(before - largest)
        largest_ref[...] = largest
        total_ref[...] = kept * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        mean_ref[...] = spread(kept, v.shape[1]) * mean_ref[...] + product(weights.astype(v.dtype), v, (1, 0))

    @pl.when(step == options.steps - 1)
    def _():
        total = jnp.where(total_ref[...] == 0, 1, total_ref[...])
        means_ref[0, 0] = mean_ref[...] / spread(total, mean_ref.shape[1])
        logsumexp_ref[0, 0] = ((largest_ref[...] + jnp.log2(total)) / LOG2_E).T[:1]


def _seen(options: _Options, length, tile, inputs):
    """Bool [queries, slots * G] of a tile: the slot is visible to the query, and the vector of its group."""
    group, time = inputs["rows"][:, :1], inputs["rows"][:, 1:]
    own, slot = inputs["vectors"][:1], inputs["vectors"][1:] + tile * (options.pages * options.slots)
    position = length - options.time + time
    seen = slot <= position
    if options.groups > 1:
        seen &= group == own
    if options.window is not None:
        seen &= slot > position - options.window
    if "visible" in inputs:
        shown = product(inputs["visible"][0, 0], inputs["repeat"][...], (1, 0))
        seen &= jnp.concatenate([shown[i : i + 1] for i in range(len(shown))], axis=1) > 0
    return seen
