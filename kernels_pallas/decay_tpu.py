"""Values inside of TPU kernels with a matrix state: products, rows and columns, documents, decays between tokens.

Everything is a matrix, tokens down or across. There is no cumulative sum in Mosaic: sums are masked, or made by
doubling. Exponents are sums of what lies between two tokens, or differences of exact ones, and never above 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import bounded_log_decay
from kernels_pallas.fold_tpu import roll

_GRID = 16.0  # cumulative sums of multiples of 1 / 16 are exact in float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(a, b, turn_a=False, turn_b=False):
    """a @ b in float32, either turned first (but not both); float32 at full precision unless both are bfloat16."""
    fast = a.dtype == b.dtype == jnp.bfloat16
    if not fast:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    contracted = (((0 if turn_a else 1,), (1 if turn_b else 0,)), ((), ()))
    precision = None if fast else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def _matmul_forward(a, b, turn_a, turn_b):
    return matmul(a, b, turn_a, turn_b), (a, b)


def _matmul_backward(turn_a, turn_b, residuals, change):
    a, b = residuals
    to_a, to_b = change.astype(b.dtype), change.astype(a.dtype)
    da = matmul(b, to_a, turn_b, True) if turn_a else matmul(to_a, b, False, not turn_b)
    db = matmul(to_b, a, True, turn_a) if turn_b else matmul(a, to_b, not turn_a, False)
    return da.astype(a.dtype), db.astype(b.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def order(size: int):
    """The numbers of the rows, and of the columns, of a square."""
    return (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def column(row):
    """[1, C] as [C, 1]."""
    down, across = order(row.shape[1])
    return jnp.sum(jnp.where(down == across, row, 0), axis=1, keepdims=True)


class Masks(NamedTuple):
    """The documents of a chunk, see `segments.Marks`; bool [C, C], [C, 1], [C, 1], [1, 1]."""

    same: jax.Array
    entered: jax.Array
    left: jax.Array
    survives: jax.Array


def masks(marks) -> Masks | None:
    """Of float32 [2, C], the numbers of the documents and, all along, that before the chunk; None for a single one."""
    if marks is None:
        return None
    number, before, last = marks[:1], marks[1:, :1], jnp.max(marks[:1], axis=1, keepdims=True)
    down = column(number)
    return Masks(down == number, down == before, down == last, last == before)


class HeadDecays(NamedTuple):
    """Of a chunk, for one head, zero between documents."""

    pairs: jax.Array  # [C, C]: from token j to token i >= j, 0 above
    entering: jax.Array  # [C, 1]: from the state before the chunk to the token
    leaving: jax.Array  # [C, 1]: from the token to the state after the chunk
    whole: jax.Array  # [1, 1]: from state to state


def head_decays(log_decay, documents: Masks | None, chunk: int) -> HeadDecays:
    """The decays of a chunk; log_decay [1, C], or None for no decay."""
    down, across = order(chunk)
    if log_decay is None:
        pairs = jnp.ones((chunk, chunk), jnp.float32)
        entering = leaving = jnp.ones((chunk, 1), jnp.float32)
        whole = jnp.ones((1, 1), jnp.float32)
    else:
        # Two sums, one exact and one small, so that a difference loses nothing beside violent decays.
        coarse = jax.lax.stop_gradient(jnp.round(log_decay * _GRID) / _GRID)
        exponents = sum(_sum_upto(part) - _sum_upto(part, turned=True) for part in (coarse, log_decay - coarse))
        pairs = jnp.exp(jnp.where(down > across, exponents, 0))
        entering = jnp.exp(_sum_upto(log_decay))
        leaving = jnp.exp(jnp.sum(jnp.where(across > down, log_decay, 0), axis=1, keepdims=True))
        whole = jnp.exp(jnp.sum(log_decay, axis=1, keepdims=True))
    seen = down >= across
    if documents is not None:
        seen &= documents.same
        entering = jnp.where(documents.entered, entering, 0)
        leaving = jnp.where(documents.left, leaving, 0)
        whole = jnp.where(documents.survives, whole, 0)
    return HeadDecays(jnp.where(seen, pairs, 0), entering, leaving, whole)


def _sum_upto(values, *, turned=False):
    """Cumulative sums of [1, C], as [C, 1], or as [1, C] if `turned`."""
    down, across = order(values.shape[1])
    if turned:
        return jnp.sum(jnp.where(down <= across, column(values), 0), axis=0, keepdims=True)
    return jnp.sum(jnp.where(across <= down, values, 0), axis=1, keepdims=True)


class ChannelDecays(NamedTuple):
    """Of a chunk, for one head, per channel; the last three are zero between documents."""

    levels: list  # [C, K] each: between a token and the middle of its run of 2, 4, 8, ... tokens
    entering: jax.Array  # [C, K]: from the state before the chunk to the token
    leaving: jax.Array  # [C, K]: from the token to the state after the chunk
    whole: jax.Array  # [K, 1]: from state to state


def channel_decays(log_decay, documents: Masks | None) -> ChannelDecays:
    """The decays of a chunk; log_decay [C, K], within any bounds, C a power of two."""
    chunk, log_decay = log_decay.shape[0], bounded_log_decay(log_decay, jnp.float32)
    token = jax.lax.broadcasted_iota(jnp.int32, log_decay.shape, 0)
    upto, after, levels = log_decay, jnp.zeros_like(log_decay), []
    for level in range(chunk.bit_length() - 1):
        half = 1 << level
        later = (token & half) != 0
        levels.append(jnp.exp(jnp.where(later, upto, after)))
        run = upto + after
        upto = upto + jnp.where(later, roll(run, half), 0)
        after = after + jnp.where(later, 0, roll(run, -half))
    entering, leaving = jnp.exp(upto), jnp.exp(after)
    whole = column(jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True)))
    if documents is not None:
        entering = jnp.where(documents.entered, entering, 0)
        leaving = jnp.where(documents.left, leaving, 0)
        whole = jnp.where(documents.survives, whole, 0)
    return ChannelDecays(levels, entering, leaving, whole)


def channel_pairs(decays: ChannelDecays, x, k, documents: Masks | None):
    """sum over channels of x_i k_j decay(j to i), for j < i of one document, else 0; x, k [C, K] -> [C, C].

    Two tokens meet at the middle of the smallest run of 2, 4, 8, ... tokens that holds both (anchors as in
    arXiv 2312.06635, at every power of two): one matmul per size of runs, and no factor above 1.
    """
    down, across = order(x.shape[0])
    apart = down ^ across
    pairs = jnp.zeros(apart.shape, jnp.float32)
    for level, decay in enumerate(decays.levels):
        near = matmul((x * decay).astype(x.dtype), (k * decay).astype(k.dtype), False, True)
        meet = (apart >> level) == 1  # the highest bit in which they differ
        pairs = jnp.where(meet, near, pairs)
    seen = down > across
    if documents is not None:
        seen &= documents.same
    return jnp.where(seen, pairs, 0)
