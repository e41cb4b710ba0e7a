"""Fused attention on TPUs (arXiv 2205.14135, 2307.08691): no tile of logits leaves the chip's fast memory.

Queries and keys are laid out [B, heads, time, width] and filled up to whole blocks. A kernel walks a list of the tiles
that are needed (`visits`), which it reads ahead of its loads; the backward pass makes every tile again from the inputs
and the logsumexp of each row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.mosaic_tpu_backward import key_gradient, query_gradient
from kernels_pallas.attention.mosaic_tpu_forward import forward
from kernels_pallas.attention.mosaic_tpu_tile import LANES, Options, key_marks, query_marks
from kernels_pallas.attention.visibility import Visibility
from kernels_pallas.attention.visits import visits
from kernels_pallas.dispatch import unfit

WIDEST = 256
_TABLES_BYTES = 512 * 1024  # of the scalar memory, which has 1 MiB


def obstacles(q, k, v, sinks, bias, visibility: Visibility, softcap: float | None) -> list[str]:
    """What of this call the kernel cannot honour, in words; empty if it can run."""
    del sinks, softcap
    (batch, time), keys, blocks = q.shape[:2], k.shape[1], heuristic(q, k, v, visibility)
    tiles = -(-time // blocks["query"]) * -(-keys // blocks["key"])
    alone = visibility.segment_ids is None and visibility.prefix_length is None and visibility.in_order
    checks = {
        f"dtypes {q.dtype}, {k.dtype}, {v.dtype}": not q.dtype == k.dtype == v.dtype,
        f"head size {max(q.shape[3], v.shape[3])}": max(q.shape[3], v.shape[3]) > WIDEST,
        "bias": bias is not None,
        f"lists of {tiles} tiles in {batch} rows": 12 * tiles * (1 if alone else batch) > _TABLES_BYTES,
    }
    return unfit({"q": q}, "float32", "bfloat16") + [name for name, fails in checks.items() if fails]


CHOICES = {"query": (256, 512, 1024), "key": (256, 512, 1024, 2048)}
"""Block sizes that tuning tries."""


def heuristic(q, k, v, visibility: Visibility) -> dict[str, int]:
    """Tiles of 512 queries and 512 keys, 1024 keys from 8192 on.

    It rests on fast memory alone, not on measurement: a tile of float32 logits takes 1 or 2 MiB, and a kernel holds
    three at a time. A window does without the longer blocks, most of which it would mask.
    """
    del v
    long = k.shape[1] >= 8192 and visibility.window is None
    return {"query": _whole(q.shape[1], 512), "key": _whole(k.shape[1], 1024 if long else 512)}


def _whole(time: int, block: int) -> int:
    """The largest multiple of LANES up to `block`, and up to what `time` fills."""
    return LANES * max(1, min(block // LANES, -(-time // LANES)))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    bias: None,
    visibility: Visibility,
    *,
    scale: float,
    softcap: float | None,
    blocks: dict[str, int],
    simulated: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Attention and the logsumexp of every row, the sink in it; gradients flow through both.

    Args:
        q: [B, T, H, K]. k: [B, S, G, K]. v: [B, S, G, V]. sinks: [H] or None.
        blocks: "query" and "key", rounded down to multiples of 128.
        simulated: run in the interpreter, with `InterpretParams` in the one that simulates the chip's memories.

    Returns:
        [B, T, H, V] in q's dtype, and float32 [B, T, H], about -1e20 (`reference.NOTHING`) where a query sees nothing.
    """
    del bias
    sizes = _whole(q.shape[1], blocks["query"]), _whole(k.shape[1], blocks["key"])
    options = Options(visibility.rule(), q.shape[1], k.shape[1], sizes, scale, softcap, simulated)
    return _attend(options, q, k, v, sinks, visibility)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, visibility):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] -> y [B,T,H,V], logsumexp [B,T,H]."""
    return _forward(options, q, k, v, sinks, visibility)[0]


def _forward(options, q, k, v, sinks, visibility):
    tokens = [_filled(x, block) for x, block in zip((q, k, v), _blocks(options), strict=True)]
    listed = visits(visibility, options.time, options.keys, options.blocks)
    y, logsumexp = forward(options, listed, *_masks(options, visibility), *tokens, sinks)
    results = _emptied(y, options.time), logsumexp[:, :, 0, : options.time].swapaxes(1, 2)
    return results, (q, k, v, sinks, visibility, *results)


def _backward(options, residuals, cotangents):
    q, k, v, sinks, visibility, y, logsumexp = residuals
    dy, dlogsumexp = cotangents
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - dlogsumexp
    statistics = _filled(jnp.stack([logsumexp, delta], axis=-1), options.blocks[0]).swapaxes(2, 3)
    sizes = (*_blocks(options), options.blocks[0])
    tokens = [_filled(x, block) for x, block in zip((q, k, v, dy.astype(q.dtype)), sizes, strict=True)]
    masks = _masks(options, visibility)
    by_query, by_key = (
        visits(visibility, options.time, options.keys, options.blocks, by_key=by_key) for by_key in (False, True)
    )
    dq = query_gradient(options, by_query, *masks, *tokens, statistics)
    dk, dv = key_gradient(options, by_key, *masks, *tokens, statistics)
    dsinks = None
    if sinks is not None:
        dsinks = -jnp.sum(jnp.exp(sinks.astype(jnp.float32) - logsumexp) * delta, axis=(0, 1)).astype(sinks.dtype)
    dk, dv = _emptied(dk, options.keys), _emptied(dv, options.keys)
    return _emptied(dq, options.time), dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)


def _blocks(options: Options) -> tuple[int, int, int]:
    """Of queries, keys and values."""
    return options.blocks[0], options.blocks[1], options.blocks[1]


def _masks(options: Options, visibility: Visibility):
    """Prefixes, and the marks of queries and keys filled up to whole blocks, with 0, which is no document."""

    def fill(marks, block):
        if not marks.names:
            return marks
        missing = -marks.values.shape[2] % block
        return marks._replace(values=jnp.pad(marks.values, ((0, 0), (0, 0), (0, missing))))

    queries, keys = fill(query_marks(visibility), options.blocks[0]), fill(key_marks(visibility), options.blocks[1])
    return visibility.prefix_length, queries, keys


def _filled(values: jax.Array, block: int) -> jax.Array:
    """[B, time, heads, n] as [B, heads, time, n], whole blocks long."""
    missing = -values.shape[1] % block
    return jnp.pad(values, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)


def _emptied(values: jax.Array, time: int) -> jax.Array:
    """The inverse of `_filled`."""
    return values[:, :, :time].swapaxes(1, 2)
