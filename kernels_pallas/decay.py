"""Products of decays between the tokens of a chunk, never as a quotient of two cumulative ones.

A weight exp(sum of log-decays over j < t <= i) is at most 1 whatever the log-decays are, but its two factors exp(s_i)
and exp(-s_j) are not. Per head the exponent s_i - s_j is formed before exp; per channel the weights factor around
anchors between i and j, where both factors are at most 1 (arXiv 2312.06635, with anchors at every power of two).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 16  # tokens, of which all pairs are at most four anchors away
_GRID = 16.0  # cumulative sums of multiples of 1 / 16 are exact in float32

_highest = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class HeadDecays(NamedTuple):
    """Of a chunk, per head, zero between documents: [B, C, H] or without decay [1 or B, C, 1], and so on."""

    pairs: jax.Array  # [B, H, C, C]: from token j to token i >= j, 0 above
    entering: jax.Array  # [B, C, H]: from the state before the chunk to the token
    leaving: jax.Array  # [B, C, H]: from the token to the state after the chunk
    whole: jax.Array  # [B, H]: from state to state


def head_decays(log_decay, marks, chunk: int, dtype) -> HeadDecays:
    """The decays of a chunk; log_decay [B,C,H] in float32 or float64, or None for no decay."""
    row, column = np.arange(chunk)[:, None], np.arange(chunk)
    if log_decay is None:
        pairs = jnp.ones((1, 1, chunk, chunk), dtype)
        entering = leaving = jnp.ones((1, chunk, 1), dtype)
        whole = jnp.ones((1, 1), dtype)
    else:
        # Two sums, one exact and one small, so that a difference loses nothing beside violent decays.
        coarse = jax.lax.stop_gradient(jnp.round(log_decay * _GRID) / _GRID)
        sums = [jnp.cumsum(part, axis=1).swapaxes(1, 2) for part in (coarse, log_decay - coarse)]
        exponents = sum(part[..., :, None] - part[..., None, :] for part in sums)
        pairs = jnp.exp(jnp.where(row > column, exponents, 0))
        # Sums of what lies between, not differences, whose gradients would drown small ones beside large ones.
        entering = jnp.exp(_highest("ts,bsh->bth", (row >= column).astype(dtype), log_decay))
        leaving = jnp.exp(_highest("ts,bsh->bth", (row < column).astype(dtype), log_decay))
        whole = entering[:, -1]
    seen = row >= column
    if marks is not None:
        seen = (marks.same() & seen)[:, None]
        entering = jnp.where(marks.entered()[..., None], entering, 0)
        leaving = jnp.where(marks.left()[..., None], leaving, 0)
        whole = jnp.where(marks.survives()[:, None], whole, 0)
    return HeadDecays(jnp.where(seen, pairs, 0), entering, leaving, whole)


class ChannelDecays(NamedTuple):
    """Of a chunk, per head and channel, in I = C // 16 blocks; the last three are zero between documents."""

    levels: jax.Array  # [B, H, I, 4, 16, K]: between a token and the anchor of its level
    prefix: jax.Array  # [B, H, I, 16, K]: from the start of the block to the token
    suffix: jax.Array  # [B, H, I, 16, K]: from the token to the end of the block
    between: jax.Array  # [B, H, I, J, K]: from the end of block J to the start of block I > J
    entering: jax.Array  # [B, H, C, K]: from the start of the chunk to the token
    leaving: jax.Array  # [B, H, C, K]: from the token to the end of the chunk
    whole: jax.Array  # [B, H, K]: over the chunk


def channel_decays(log_decay, marks) -> ChannelDecays:
    """The decays of a chunk; log_decay [B,C,H,K], C a multiple of 16."""
    batch, chunk, heads, width = log_decay.shape
    blocks = chunk // BLOCK
    log_decay = log_decay.transpose(0, 2, 1, 3).reshape(batch, heads, blocks, BLOCK, width)
    ranges = jnp.asarray(_ranges(), log_decay.dtype)
    within = jnp.exp(_highest("lts,bhisk->bhiltk", ranges, log_decay))
    totals = jnp.sum(log_decay, axis=3)
    index = np.arange(blocks)
    middle = (index[:, None] < index[None]).T[:, :, None] & (index[None, None] < index[:, None, None])
    middle &= index[None, None] > index[None, :, None]
    spans = np.concatenate([middle, np.tri(blocks, k=-1, dtype=bool)[:, None], ~np.tri(blocks, dtype=bool)[:, None]], 1)
    outer = jnp.exp(_highest("ijm,bhmk->bhijk", jnp.asarray(spans, log_decay.dtype), totals))
    prefix, suffix = within[:, :, :, 4], within[:, :, :, 5]
    shape = (batch, heads, chunk, width)
    entering = (prefix * outer[:, :, :, -2, None]).reshape(shape)
    leaving = (suffix * outer[:, :, :, -1, None]).reshape(shape)
    whole = jnp.exp(jnp.sum(totals, axis=2))
    if marks is not None:
        entering = jnp.where(marks.entered()[:, None, :, None], entering, 0)
        leaving = jnp.where(marks.left()[:, None, :, None], leaving, 0)
        whole = jnp.where(marks.survives()[:, None, None], whole, 0)
    return ChannelDecays(within[:, :, :, :4], prefix, suffix, outer[:, :, :, :-2], entering, leaving, whole)


def channel_pairs(decays: ChannelDecays, x, k):
    """sum over channels of x_i k_j decay(j to i), for j < i, else 0; x [B,H,X,C,K], k [B,H,C,K] -> [B,H,X,C,C].

    Pairs within a block meet at the middle of the smallest run of 2, 4, 8 or 16 tokens that holds both; pairs of
    different blocks at the start of the later one.
    """
    batch, heads, many, chunk, width = x.shape
    blocks = chunk // BLOCK
    x = x.reshape(batch, heads, many, blocks, BLOCK, width)
    k = k.reshape(batch, heads, blocks, BLOCK, width)
    later, together = _halves()
    later = jnp.asarray(later[..., None], x.dtype)
    rights = x[:, :, :, :, None] * (decays.levels * later)[:, :, None]
    lefts = k[:, :, :, None] * (decays.levels * (1 - later))
    near = jnp.einsum("bhxiltk,bhilsk->bhxilts", rights, lefts)
    near = jnp.sum(near * jnp.asarray(together, x.dtype), axis=4)
    if blocks == 1:
        return near.reshape(batch, heads, many, chunk, chunk)
    tails = (k * decays.suffix)[:, :, None] * decays.between[:, :, :, :, None]
    tails = tails.reshape(batch, heads, blocks, chunk, width)
    far = jnp.einsum("bhxitk,bhisk->bhxits", x * decays.prefix[:, :, None], tails)
    far = far.reshape(batch, heads, many, blocks, BLOCK, blocks, BLOCK)
    index = np.arange(blocks)
    earlier = (index[:, None] > index)[:, None, :, None]
    own = jnp.asarray((index[:, None] == index)[:, None, :, None], x.dtype)
    pairs = jnp.where(earlier, far, 0) + near[:, :, :, :, :, None] * own
    return pairs.reshape(batch, heads, many, chunk, chunk)


@functools.cache
def _halves():
    """Per level: which tokens [4,16] lie in the later half of their run, and which pairs [4,16,16] share a run."""
    token, sizes = np.arange(BLOCK), np.array([1, 2, 4, 8])[:, None]
    run = token // (2 * sizes)
    return token // sizes % 2 == 1, run[:, :, None] == run[:, None, :]


@functools.cache
def _ranges():
    """[6,16,16]: whose log-decays lie between a token and its anchor, per level; in its block up to it; after it."""
    later, together = _halves()
    token = np.arange(BLOCK)
    upto, after = token[None] <= token[:, None], token[None] > token[:, None]
    sizes = np.array([1, 2, 4, 8])[:, None, None]
    half = (token[:, None] // sizes) == (token[None] // sizes)
    levels = half & np.where(later[..., None], upto, after)
    return np.concatenate([levels, upto[None], after[None]])
