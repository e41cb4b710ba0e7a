"""Attention in plain JAX for any backend: a custom gradient over blocks of queries.

Between the passes only the output and the logsumexp of every row are kept (arXiv 2307.08691); the logits of one block
exist at a time, and keys that causality or the window hide from a whole block are never touched. Rows are laid out
[B, G, T, R, ...], R = H // G query heads of a group next to each other, so that grouped heads make one matmul with
their shared keys and a block of time stays contiguous.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocks import add_pieces, bands, piece, reach, scan_band, take, unstack
from kernels_pallas.attention.reference import NOTHING
from kernels_pallas.attention.visibility import Visibility

_MASKED = -1e30  # finite: a difference of two infinities would be NaN; exp(_MASKED - NOTHING) is 0
_MOST_MERGED_GROUPS = 16  # merging multiplies the arithmetic of decoding by the groups


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    block: int


def attention(q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None, block: int = 0):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], sinks [H] or None, bias [1|B,1|H,T,S] or None.

    `block` is the queries whose logits exist at one time; 0 takes `default_block`.

    Returns:
        [B,T,H,V] in q's dtype, and the logsumexps [B,T,H].
    """
    options = _Options(scale, softcap, block or default_block(q.shape[1], jax.default_backend()))
    if q.shape[1] == 1 and 1 < k.shape[2] <= _MOST_MERGED_GROUPS:
        return _one_query(options, q, k, v, sinks, bias, visibility)
    return _grouped(options, q, k, v, sinks, bias, visibility)


def default_block(time: int, backend: str) -> int:
    """Queries per block that ran fastest: see `benchmarks/attention.py`. Only CPUs were measured."""
    if backend != "cpu":
        return 512
    return 64 if time <= 1024 else 128


def _one_query(options, q, k, v, sinks, bias, visibility):
    """One query per sequence: its heads, zero outside their own group's columns, meet all groups in a single matmul.

    A matmul per group would first copy the whole cache into another layout; this one reads it once, as it lies.
    """
    (batch, keys, groups, width), heads = k.shape, q.shape[2]
    own = jnp.arange(heads) // (heads // groups)
    columns = own[:, None, None] == jnp.arange(groups)[:, None]
    spread = jnp.where(columns, q[..., None, :], 0).reshape(batch, 1, heads, groups * width)
    flat_k, flat_v = k.reshape(batch, keys, 1, -1), v.reshape(batch, keys, 1, -1)
    y, lse = _grouped(options, spread, flat_k, flat_v, sinks, bias, visibility)
    y = y.reshape(batch, 1, heads, groups, -1)
    return jnp.take_along_axis(y, own[None, None, :, None, None], axis=3)[..., 0, :], lse


def _grouped(options, q, k, v, sinks, bias, visibility):
    (batch, time, heads, width), groups = q.shape, k.shape[2]
    members = heads // groups
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(batch, time, groups, members, width).swapaxes(1, 2)
    if sinks is not None:
        sinks = sinks.astype(dtype).reshape(groups, 1, members)
    if bias is not None:
        head_axes = (1, 1) if bias.shape[1] == 1 else (groups, members)
        bias = bias.astype(dtype).reshape(-1, *head_axes, *bias.shape[2:]).swapaxes(2, 3)
    y, lse = _attend(options, rows, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, bias, visibility)
    return y.swapaxes(1, 2).reshape(batch, time, heads, -1), lse.swapaxes(1, 2).reshape(batch, time, heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, bias, visibility):
    """q [B,G,T,R,K], k [B,G,S,K], v [B,G,S,V], sinks [G,1,R], bias [1|B,1|G,T,1|R,S].

    Returns:
        [B,G,T,R,V] and the logsumexps [B,G,T,R].
    """
    return _forward(options, q, k, v, sinks, bias, visibility)[0]


def _forward(options, q, k, v, sinks, bias, visibility):
    def block(_, rows, pieces):
        out = _forward_block(options, *_operands(q, k, v, bias, visibility, rows, pieces), sinks)
        return None, out

    y, normaliser = _for_blocks(block, None, options.block, q.shape[2], k.shape[2], visibility)[1]
    # Computed once: XLA would otherwise redo the joining of the blocks for every logit of the backward.
    normaliser = jax.lax.optimization_barrier(normaliser)
    return (y, normaliser), (q, k, v, sinks, bias, visibility, y, normaliser)


def _backward(options, residuals, changes):
    q, k, v, sinks, bias, visibility, y, normaliser = residuals
    dy, dnormaliser = changes
    dtype = normaliser.dtype
    delta = jax.lax.optimization_barrier(jnp.sum(dy.astype(dtype) * y.astype(dtype), axis=-1) - dnormaliser)

    def block(carry, rows, pieces):
        dk, dv, dbias = carry
        operands = _operands(q, k, v, bias, visibility, rows, pieces)
        row_values = [take(x, [rows], axis=2) for x in (dy, normaliser, delta)]
        dq, part_dk, part_dv, dlogits = _backward_block(options, *operands, *row_values)
        dk, dv = add_pieces(dk, part_dk, pieces, axis=2), add_pieces(dv, part_dv, pieces, axis=2)
        if bias is not None:
            summed = [axis for axis in (0, 1, 3) if bias.shape[axis] == 1]
            part = jnp.sum(dlogits, axis=summed, keepdims=True)
            rows_dbias = add_pieces(take(dbias, [rows], axis=2), part, pieces, axis=4)
            dbias = jax.lax.dynamic_update_slice_in_dim(dbias, rows_dbias, rows[0], axis=2)
        return (dk, dv, dbias), (dq.astype(q.dtype),)

    zeros = (jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype), None if bias is None else jnp.zeros_like(bias))
    (dk, dv, dbias), (dq,) = _for_blocks(block, zeros, options.block, q.shape[2], k.shape[2], visibility)
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - normaliser) * delta, axis=(0, 2))[:, None]
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dsinks, dbias, None


_attend.defvjp(_forward, _backward)


def _for_blocks(body, carry, block: int, time: int, keys: int, visibility):
    """Fold `carry, outputs = body(carry, rows, pieces)` over blocks of rows; outputs are joined along axis 2.

    `rows` is a block of queries, `pieces` the keys that some of them may see: first keys, and then a stretch.
    """
    before, after, first_keys = visibility.before, visibility.after, visibility.first_keys
    outputs = []
    for band in bands(time, block, split=after is not None and before is None):
        start, length, count = band
        start += keys - time
        within = reach(start, start + length * count, before, after, (first_keys, keys))

        def step(carry, start, length, within=within):
            stretch = piece(start + keys - time, length, before, after, within)
            pieces = [part for part in ((0, first_keys), stretch) if part[1]] or [(0, 1)]
            return body(carry, (start, length), pieces)

        carry, output = scan_band(step, carry, band)
        outputs.append(output)
    return carry, tuple(unstack(parts, axis=2) for parts in zip(*outputs, strict=True))


def _operands(q, k, v, bias, visibility, rows, pieces):
    """The parts of the arguments that some rows and pieces of keys need, the mask [1|B,1,t,1,s] last."""
    seen = visibility.take(rows, pieces).mask()
    seen = None if seen is None else seen[:, None, :, None, :]
    bias = None if bias is None else take(take(bias, [rows], axis=2), pieces, axis=4)
    return take(q, [rows], axis=2), take(k, pieces, axis=2), take(v, pieces, axis=2), bias, seen


def _forward_block(options, q, k, v, bias, seen, sinks):
    """Outputs [B,G,t,R,V] and logsumexps [B,G,t,R] of some rows over some keys."""
    logits, _ = _logits(options, q, k, bias, seen)
    largest = jnp.maximum(jnp.max(logits, axis=-1), NOTHING)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    total = jnp.where(total == 0, 1, total)
    y = jnp.einsum("bgms,bgsv->bgmv", _merged(weights.astype(v.dtype)), v, preferred_element_type=weights.dtype)
    y = y.reshape(*q.shape[:-1], -1) / total[..., None]
    return y.astype(q.dtype), largest + jnp.log(total)


def _backward_block(options, q, k, v, bias, seen, dy, normaliser, delta):
    """Of some rows and keys: dq [B,G,t,R,K], dk [B,G,s,K], dv [B,G,s,V], dlogits [B,G,t,R,s], all wide."""
    dtype = normaliser.dtype
    logits, slope = _logits(options, q, k, bias, seen)
    weights = jnp.exp(logits - normaliser[..., None])
    merged_dy = _merged(dy)
    dweights = jnp.einsum("bgmv,bgsv->bgms", merged_dy, v, preferred_element_type=dtype).reshape(weights.shape)
    dlogits = weights * (dweights - delta[..., None])
    dproducts = _merged((dlogits * slope).astype(q.dtype))
    dq = jnp.einsum("bgms,bgsk->bgmk", dproducts, k, preferred_element_type=dtype).reshape(q.shape)
    dk = jnp.einsum("bgms,bgmk->bgsk", dproducts, _merged(q), preferred_element_type=dtype)
    dv = jnp.einsum("bgms,bgmv->bgsv", _merged(weights.astype(dy.dtype)), merged_dy, preferred_element_type=dtype)
    return dq, dk, dv, dlogits


def _logits(options, q, k, bias, seen):
    """Scaled, capped, biased and masked logits [B,G,t,R,s]; and their slope in the products of queries and keys."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("bgmk,bgsk->bgms", _merged(q), k, preferred_element_type=dtype)
    logits, slope = options.scale * products.reshape(*q.shape[:-1], -1), options.scale
    if options.softcap is not None:
        cap = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * cap, options.scale * (1 - cap**2)
    if bias is not None:
        logits += bias
    return logits if seen is None else jnp.where(seen, logits, _MASKED), slope


def _merged(x):
    """[B,G,t,R,n] as [B,G,t*R,n]. XLA copies the other operand of a matmul whose rows are spread over two axes."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])
