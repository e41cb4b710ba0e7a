"""Softmax attention: grouped heads, windows, kept first tokens, sinks, softcap, prefixes, biases, packed documents."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import kernel, tuning
from kernels_pallas.attention import cudnn, reference, ring, tokamax, xla
from kernels_pallas.attention.visibility import Visibility, document_ranks
from kernels_pallas.dispatch import choose
from kernels_pallas.over_time import over_devices
from kernels_pallas.partition import partitioned
from kernels_pallas.target import Target, current

_HEADS = ("batch", None, "heads")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    kept: int = 0,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    prefix_length: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Weighted mean of values, weights softmax(scale q·k), per head, over the keys a query sees.

    Args:
        q: [B, T, H, K] queries. k: [B, S, G, K] keys. v: [B, S, G, V] values. H is a multiple of G: head h reads
            group h // (H // G).
        causal: a query sees no key of a later position.
        window: a query sees its own position and the `window` - 1 before it (and after it, if not causal).
        kept: the first `kept` positions of a document stay visible beyond the window (arXiv 2309.17453).
        sinks: [H] learned logits that join the softmax's denominator and nothing else.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        prefix_length: int [B]; keys of a position below it are visible to every query of their document.
        bias: [1 or B, 1 or H, T, S], added to the scaled, capped logits; differentiable.
        scale: of the logits; K ** -0.5 if None.
        segment_ids: int [B, T], document of each query; nothing crosses documents, 0 is padding and yields zeros.
        key_segment_ids: int [B, S]; `segment_ids` if None, which needs S == T.
        query_positions, key_positions: int [B, T] and [B, S]: the order, for caches whose slots are out of order. If
            None, the index, the queries being the last T of S. Positions may restart in every document.
        return_lse: also return the logarithm of the softmax's denominator, by which parts over different keys merge.
        implementation: "auto", "reference" (all logits at once), "xla" (in blocks of queries), "cudnn", "tokamax" (the
            package), or "pallas" (a kernel, on TPUs and Hopper GPUs).

    Returns:
        [B, T, H, V] in q's dtype; softmax in float32 (float64 for float64 inputs); 0 where a query sees no key. With
        `return_lse` also [B, T, H], float32 (float64), differentiable: log(sum of exp(logits), sink included), -1e20
        where a query sees neither key nor sink.

    Raises:
        ValueError: shapes that do not fit, naming the argument, or an implementation that cannot honour the call.
    """
    _check_shapes(q, k, v, sinks, prefix_length, bias)
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, not {window}")
    if kept < 0:
        raise ValueError(f"attention: kept must not be negative, not {kept}")
    visibility = _visibility(
        q, k, causal, window, kept, prefix_length, segment_ids, key_segment_ids, query_positions, key_positions
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "softcap": softcap, "implementation": implementation}
    if q.shape[1] == k.shape[1] and over_devices(q.shape[1]):
        run = functools.partial(_attention, **options, return_lse=True)
        y, lse = ring.attention(run, q, k, v, sinks, bias, visibility)
        return (y, lse) if return_lse else y
    return _attention(q, k, v, sinks, bias, visibility, **options, return_lse=return_lse)


def _attention(q, k, v, sinks, bias, visibility: Visibility, *, scale, softcap, implementation, return_lse):
    """By one of the implementations; y, or with `return_lse` y and the logsumexps."""
    target, inputs, window = current(), (q, k, v, sinks, bias, visibility), visibility.window
    others = {
        "cudnn": cudnn.obstacles(q, k, v, sinks, visibility, softcap, return_lse),
        "xla": [],
        "reference": [],
        "tokamax": tokamax.obstacles(q, k, bias, sinks, visibility, softcap, return_lse),
    }
    forms = kernel.ranked("attention", target, _bucket(q, k, v, window), (*inputs, softcap), **others)
    name = choose("attention", implementation, forms)
    if name == "cudnn":
        return cudnn.attention(q, k, v, bias, visibility, scale=scale)
    if name == "tokamax":
        return tokamax.attention(q, k, v, bias, visibility, scale=scale, softcap=softcap)
    if name == "pallas":
        y, lse = _by_kernel(target, *inputs, scale=scale, softcap=softcap)
    else:
        run = xla.attention if name == "xla" else reference.attention
        y, lse = run(*inputs, scale=scale, softcap=softcap)
    return (y, lse) if return_lse else y


def _bucket(q, k, v, window: int | None) -> str:
    (batch, time, heads, width), (_, keys, groups, value) = q.shape, v.shape
    sizes = {"batch": batch, "time": time, "keys": keys, "heads": heads, "groups": groups, "key": width, "value": value}
    return tuning.bucket(**sizes, window=min(window or keys, keys))


def _by_kernel(target: Target, q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None):
    """y [B,T,H,V] and logsumexps [B,T,H] by the target's kernel, under the ambient mesh if there is one."""
    held = kernel.module("attention", target)
    leaves, structure = jax.tree.flatten(visibility)

    def run(q, k, v, sinks, bias, *leaves):
        seen = jax.tree.unflatten(structure, leaves)
        shapes = _bucket(q, k, v, seen.window)
        blocks = tuning.blocks("attention", target, shapes, held.heuristic(q, k, v, seen))
        options = {"scale": scale, "softcap": softcap, "blocks": blocks, "simulated": target.simulated}
        return held.attention(q, k, v, sinks, bias, seen, **options)

    rows = [("batch",) if leaf.shape[0] == q.shape[0] else () for leaf in leaves]
    per_bias = () if bias is None else [kind if bias.shape[axis] > 1 else None for axis, kind in enumerate(_HEADS[::2])]
    axes = (_HEADS, _HEADS, _HEADS, ("heads",), per_bias, *rows)
    return partitioned(run, (q, k, v, sinks, bias, *leaves), axes, (_HEADS, _HEADS))


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    window: int | None = None,
    kept: int = 0,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The weights of causal `attention`, all at once: for looking at a few rows, not for training.

    Args:
        q: [B, T, H, K] queries. k: [B, T, G, K] keys. Others as in `attention`.

    Returns:
        [B, H, T, T], float32 (float64 for float64 inputs); a learned sink takes its part of each row's sum of one.

    Raises:
        ValueError: shapes that do not fit, naming the argument.
    """
    _check_shapes(q, k, k, sinks, None, bias)
    visibility = _visibility(q, k, True, window, kept, None, segment_ids, None, None, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.probabilities(q, k, sinks, bias, visibility, scale=scale, softcap=softcap)[0]


def _check_shapes(q, k, v, sinks, prefix_length, bias) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.ndim != 4:
            raise ValueError(f"attention: {name} must be [batch, time, heads, width], not shape {value.shape}")
    batch, time, heads, width = q.shape
    _, keys, groups, _ = k.shape
    if k.shape != (batch, keys, groups, width):
        raise ValueError(f"attention: k of shape {k.shape} does not fit q of shape {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: v of shape {v.shape} does not fit k of shape {k.shape}")
    if groups == 0 or heads % groups:
        raise ValueError(f"attention: q has {heads} heads, not a multiple of the {groups} of k")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"attention: sinks must have shape ({heads},), not {sinks.shape}")
    if prefix_length is not None and prefix_length.shape != (batch,):
        raise ValueError(f"attention: prefix_length must have shape ({batch},), not {prefix_length.shape}")
    if bias is not None:
        fits = bias.ndim == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not fits or bias.shape[2:] != (time, keys):
            raise ValueError(
                f"attention: bias must have shape [1 or {batch}, 1 or {heads}, {time}, {keys}], not {bias.shape}"
            )


def _visibility(
    q, k, causal, window, kept, prefix_length, segment_ids, key_segment_ids, query_positions, key_positions
) -> Visibility:
    (batch, time), keys = q.shape[:2], k.shape[1]
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("attention: key_segment_ids needs segment_ids")
    if segment_ids is not None and key_segment_ids is None:
        if time != keys:
            raise ValueError(f"attention: segment_ids of {time} queries and {keys} keys needs key_segment_ids")
        key_segment_ids = segment_ids
    given = {
        "segment_ids": (segment_ids, time),
        "key_segment_ids": (key_segment_ids, keys),
        "query_positions": (query_positions, time),
        "key_positions": (key_positions, keys),
    }
    for name, (value, length) in given.items():
        if value is not None and value.shape != (batch, length):
            raise ValueError(f"attention: {name} must have shape {(batch, length)}, not {value.shape}")
    in_order = query_positions is None and key_positions is None
    if query_positions is None:
        query_positions = jnp.arange(keys - time, keys, dtype=jnp.int32)[None]
    if key_positions is None:
        key_ranks = jnp.arange(keys, dtype=jnp.int32)[None]
        if segment_ids is not None and kept and window is not None:
            key_ranks = document_ranks(key_segment_ids)
        key_positions = jnp.arange(keys, dtype=jnp.int32)[None]
    else:
        key_ranks = key_positions
    return Visibility(
        query_positions=query_positions,
        key_positions=key_positions,
        key_ranks=key_ranks,
        prefix_length=prefix_length,
        segment_ids=segment_ids,
        key_segment_ids=key_segment_ids,
        causal=causal,
        window=window,
        kept=kept,
        in_order=in_order,
    )
