"""Attention in plain JAX for any backend: blocks of queries forward, blocks of keys backward.

Between the passes only the output and the logsumexp of every row are kept (arXiv 2307.08691); the logits of one block
exist at a time, and keys that causality or the window hide from a whole block are never touched. Rows are laid out
[B, G, T, R, ...], R = H // G query heads of a group next to each other, so that grouped heads make one matmul with
their shared keys and a block of time stays contiguous.

XLA's CPU matmul runs at half speed when it contracts the rows of its left operand, so the backward works on transposed
logits [.., S, T, R], and writes the one product left over, the queries' gradient, transposed as well.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocks import bands, piece, reach, scan_band, take, unstack
from kernels_pallas.attention.visibility import Visibility

_MASKED = -1e30  # finite: a difference of two infinities would be NaN
_FLOOR = -1e20  # of a row's maximum: exp(_MASKED - _FLOOR) is 0, so a row that sees nothing sums to 0


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    block: int


def attention(q, k, v, sinks, bias, visibility: Visibility, *, scale: float, softcap: float | None, block: int = 64):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], sinks [H] or None, bias [1|B,1|H,T,S] or None -> [B,T,H,V] in q's dtype."""
    (batch, time, heads, width), groups = q.shape, k.shape[2]
    members = heads // groups
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(batch, time, groups, members, width).swapaxes(1, 2)
    if sinks is not None:
        sinks = sinks.astype(dtype).reshape(groups, 1, members)
    if bias is not None:
        head_axes = (1, 1) if bias.shape[1] == 1 else (groups, members)
        bias = bias.astype(dtype).reshape(-1, *head_axes, *bias.shape[2:]).swapaxes(2, 3)
    options = _Options(scale, softcap, block)
    y = _attend(options, rows, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, bias, visibility)
    return y.swapaxes(1, 2).reshape(batch, time, heads, v.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, bias, visibility):
    """q [B,G,T,R,K], k [B,G,S,K], v [B,G,S,V], sinks [G,1,R], bias [1|B,1|G,T,1|R,S] -> [B,G,T,R,V]."""
    return _forward(options, q, k, v, sinks, bias, visibility)[0]


def _forward(options, q, k, v, sinks, bias, visibility):
    time, keys, first_keys = q.shape[2], k.shape[2], visibility.first_keys
    before, after = visibility.before, visibility.after
    outputs, normalisers = [], []
    for band in bands(0, time, options.block, split=after is not None and before is None):
        start = band[0] + keys - time
        within = reach(start, start + band[1] * band[2], before, after, (first_keys, keys))

        def rows(_, start, block, within=within):
            parts = [piece(start + (keys - time), block, before, after, within)]
            if first_keys:
                parts.insert(0, (0, first_keys))
            part_k, part_v = (take(x, parts, axis=2) for x in (k, v))
            part_bias = None if bias is None else take(take(bias, [(start, block)], axis=2), parts, axis=4)
            seen = visibility.take((start, block), parts).mask()
            part_q = take(q, [(start, block)], axis=2)
            return None, _forward_rows(options, part_q, part_k, part_v, sinks, part_bias, seen)

        output, normaliser = scan_band(rows, None, band)[1]
        outputs.append(output)
        normalisers.append(normaliser)
    y, normaliser = unstack(outputs, axis=2), unstack(normalisers, axis=2)
    return y, (q, k, v, sinks, bias, visibility, y, normaliser)


def _forward_rows(options, q, k, v, sinks, bias, seen):
    """Outputs [B,G,t,R,V] and logsumexps [B,G,t,R] of some rows over the keys given; `seen` [1|B, t, s]."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits, _ = _logits(options, jnp.einsum("bgtrk,bgsk->bgtrs", q, k, preferred_element_type=dtype), bias)
    if seen is not None:
        logits = jnp.where(seen[:, None, :, None, :], logits, _MASKED)
    largest = jnp.maximum(jnp.max(logits, axis=-1, initial=_MASKED), _FLOOR)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    total = jnp.where(total == 0, 1, total)
    y = jnp.einsum("bgtrs,bgsv->bgtrv", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (y / total[..., None]).astype(q.dtype), largest + jnp.log(total)


def _logits(options, products, bias):
    """Scaled, capped and biased logits of query-key products; and the slope of the logits in the products."""
    logits, slope = options.scale * products, options.scale
    if options.softcap is not None:
        cap = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * cap, options.scale * (1 - cap**2)
    return logits if bias is None else logits + bias, slope


def _backward(options, residuals, dy):
    q, k, v, sinks, bias, visibility, y, normaliser = residuals
    time, keys, first_keys = q.shape[2], k.shape[2], visibility.first_keys
    before, after, offset = visibility.before, visibility.after, k.shape[2] - q.shape[2]
    dtype = normaliser.dtype
    delta = jnp.sum(dy.astype(dtype) * y.astype(dtype), axis=-1)
    dq = jnp.zeros((*q.shape[:2], q.shape[4], time, q.shape[3]), dtype)
    dbias = None if bias is None else jnp.zeros(bias.shape, dtype)
    dk_blocks, dv_blocks = [], []

    def columns(carry, start, block, back, ahead, within):
        dq, dbias = carry
        where_q, where_k = piece(start - offset, block, back, ahead, within), (start, block)
        part_q, part_dy, part_normaliser, part_delta = (
            take(x, [where_q], axis=2) for x in (q, dy, normaliser, delta)
        )
        part_k, part_v = (take(x, [where_k], axis=2) for x in (k, v))
        part_bias = None if bias is None else take(take(bias, [where_q], axis=2), [where_k], axis=4)
        seen = visibility.take(where_q, [where_k]).mask(queries_last=True)
        part_dq, dk, dv, dlogits = _backward_columns(
            options, part_q, part_k, part_v, part_bias, seen, part_dy, part_normaliser, part_delta
        )
        part_dq += take(dq, [where_q], axis=3)
        dq = jax.lax.dynamic_update_slice_in_dim(dq, part_dq, where_q[0], axis=3)
        if bias is not None:
            dbias = _add_bias_gradient(dbias, dlogits, where_q[0], start)
        return (dq, dbias), (dk.astype(k.dtype), dv.astype(v.dtype))

    carry = dq, dbias
    for low, high, back, ahead in ((0, first_keys, after, None), (first_keys, keys, after, before)):
        for band in bands(low, high, options.block, split=after is not None and ahead is None):
            start = band[0] - offset
            within = reach(start, start + band[1] * band[2], back, ahead, (0, time))
            body = functools.partial(columns, back=back, ahead=ahead, within=within)
            carry, (dk, dv) = scan_band(body, carry, band)
            dk_blocks.append(dk)
            dv_blocks.append(dv)
    dq, dbias = carry
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - normaliser) * delta, axis=(0, 2))[:, None]
    return jnp.moveaxis(dq, 2, 4).astype(q.dtype), unstack(dk_blocks, 2), unstack(dv_blocks, 2), dsinks, dbias, None


def _backward_columns(options, q, k, v, bias, seen, dy, normaliser, delta):
    """Of some keys and the rows given: dq [B,G,K,t,R], dk [B,G,s,K], dv [B,G,s,V], dlogits [B,G,s,t,R]."""
    bias = None if bias is None else jnp.moveaxis(bias, 4, 2)
    products = jnp.einsum("bgsk,bgtrk->bgstr", k, q, preferred_element_type=normaliser.dtype)
    logits, slope = _logits(options, products, bias)
    if seen is not None:
        logits = jnp.where(seen[:, None, :, :, None], logits, _MASKED)
    weights = jnp.exp(logits - normaliser[:, :, None])
    dweights = jnp.einsum("bgsv,bgtrv->bgstr", v, dy, preferred_element_type=normaliser.dtype)
    dlogits = weights * (dweights - delta[:, :, None])
    dproducts = (dlogits * slope).astype(q.dtype)
    dv = jnp.einsum("bgstr,bgtrv->bgsv", weights.astype(dy.dtype), dy, preferred_element_type=normaliser.dtype)
    dk = jnp.einsum("bgstr,bgtrk->bgsk", dproducts, q, preferred_element_type=normaliser.dtype)
    # The barrier keeps XLA from folding this transpose into the matmul, which would then contract rows.
    turned = jax.lax.optimization_barrier(k.swapaxes(2, 3))
    dq = jnp.einsum("bgks,bgstr->bgktr", turned, dproducts, preferred_element_type=normaliser.dtype)
    return dq, dk, dv, dlogits


def _add_bias_gradient(dbias, dlogits, row, column):
    """Write what a block of dlogits [B,G,s,t,R] means for a bias [1|B,1|G,T,1|R,S]; blocks do not overlap."""
    part = jnp.moveaxis(dlogits, 2, 4)
    summed = [axis for axis in (0, 1, 3) if dbias.shape[axis] == 1]
    part = jnp.sum(part, axis=summed, keepdims=True)
    return jax.lax.dynamic_update_slice(dbias, part, (0, 0, row, 0, column))


_attend.defvjp(_forward, _backward)
