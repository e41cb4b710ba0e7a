"""Decoding: attention of the last tokens to a cache of keys and values, contiguous or in pages. Inference only."""

import jax
import jax.numpy as jnp

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import check_rank, check_shape
from kernels_pallas.decode_attention import reference, xla
from kernels_pallas.decode_attention.cache import Cache
from kernels_pallas.dispatch import choose
from kernels_pallas.partition import partitioned
from kernels_pallas.target import Target, current

_OP = "decode_attention"


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    page_table: jax.Array | None = None,
    visible: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`attention` of the last T tokens of every row to all its tokens, whose keys and values a cache holds.

    Lengths, pages and what is visible are data: they change without a new program.

    Args:
        q: [B, T, H, K] queries of the last T tokens, T small, usually 1. H is a multiple of G.
        k: [B, S, G, K] keys, slot by slot in the order of the tokens; or pages of them [P, page, G, K], which rows may
            share. v: likewise, [B, S, G, V] or [P, page, G, V]. Slots without a token hold any finite values.
        lengths: int [B], the tokens of each row, the queries' own included, at most S. A query that would come before
            the first token yields 0.
        page_table: int [B, N], the pages of each row in order, S = N * page; entries beyond the length mean nothing.
        visible: bool [B, S], the slots that queries may see at all; None: every one with a token.
        window, sinks, softcap, scale: as in `attention`.
        implementation: "auto", "reference", "xla" (gathers the pages) or "pallas" (a kernel that splits the cache, on
            TPUs and Hopper GPUs; without a gradient).

    Returns:
        [B, T, H, V] in q's dtype; softmax in float32 (float64 for float64 inputs); 0 where a query sees nothing.

    Raises:
        ValueError: shapes that do not fit, naming the argument, or an implementation that cannot honour the call.
    """
    cache = Cache(k, v, lengths, page_table, visible)
    _check(q, cache, sinks, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"window": window, "softcap": softcap, "scale": scale}
    target = current()
    others = {"xla": [], "reference": []}
    name = choose(_OP, implementation, kernel.ranked(_OP, target, _bucket(q, cache), (q, cache), **others))
    if name == "pallas":
        return _by_kernel(target, q, cache, sinks, options)
    run = xla.decode_attention if name == "xla" else reference.decode_attention
    return run(q, cache, sinks, **options)


def _check(q, cache: Cache, sinks, window: int | None) -> None:
    check_rank(_OP, "q", q, "batch, time, heads, width")
    for name, value in (("k", cache.k), ("v", cache.v)):
        check_rank(_OP, name, value, "batch or pages, slots, groups, width")
    (batch, _, heads, width), (rows, slots, groups, _) = q.shape, cache.k.shape
    paged = cache.page_table is not None
    check_shape(_OP, "k", cache.k, (rows if paged else batch, slots, groups, width))
    check_shape(_OP, "v", cache.v, (*cache.k.shape[:3], cache.v.shape[3]))
    if groups == 0 or heads % groups:
        raise ValueError(f"{_OP}: q has {heads} heads, not a multiple of the {groups} of k")
    check_shape(_OP, "lengths", cache.lengths, (batch,))
    if paged:
        check_shape(_OP, "page_table", cache.page_table, (batch, *cache.page_table.shape[1:2]))
    check_shape(_OP, "visible", cache.visible, (batch, cache.slots))
    check_shape(_OP, "sinks", sinks, (heads,))
    for name, value in (("lengths", cache.lengths), ("page_table", cache.page_table)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{_OP}: {name} must be integers, not {value.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window must be at least 1, not {window}")


def _bucket(q, cache: Cache) -> str:
    (batch, time, heads, width), (_, page, groups, value) = q.shape, cache.v.shape
    sizes = {"batch": batch, "time": time, "slots": cache.slots, "heads": heads, "groups": groups}
    page = page if cache.page_table is not None else cache.slots
    return tuning.bucket(**sizes, key=width, value=value, page=page)


def _by_kernel(target: Target, q, cache: Cache, sinks, options):
    """By the target's kernel, under the ambient mesh if there is one; pages are no axis that a mesh divides."""
    held = kernel.module(_OP, target)

    def run(q, sinks, *parts):
        part = Cache(*parts)
        blocks = tuning.blocks(_OP, target, _bucket(q, part), held.heuristic(q, part))
        return (_without_gradient(held, blocks, target.simulated, options, q, part, sinks),)

    rows = "batch" if cache.page_table is None else None
    slots, row = (rows, None, "heads"), (rows,)
    queries = (rows, None, "heads")
    axes = (queries, ("heads",), slots, slots, row, row, row)
    return partitioned(run, (q, sinks, *cache), axes, (queries,))[0]


def _without_gradient(held, blocks, simulated, options, q, cache: Cache, sinks):
    @jax.custom_vjp
    def call(q, cache, sinks):
        return held.decode_attention(q, cache, sinks, blocks=blocks, simulated=simulated, **options)

    def forward(*_):
        raise ValueError(f"{_OP}: implementation 'pallas' has no gradient; can: xla, reference")

    call.defvjp(forward, lambda *_: None)
    return call(q, cache, sinks)
