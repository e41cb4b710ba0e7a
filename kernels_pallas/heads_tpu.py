"""How heads lie in TPU kernels with a matrix state: keys and values along lanes, full tiles, gates across."""

import jax.numpy as jnp

from kernels_pallas.arguments import bounded_log_decay
from kernels_pallas.dispatch import unfit
from kernels_pallas.fold_tpu import LANES, Tokens, fill, filled
from kernels_pallas.segments import Documents, silence

WIDEST = 256
"""Key and value widths of which a state and its gradient are sure to fit in VMEM beside everything else."""


def obstacles(k, v, **others) -> list[str]:
    """What kernels with a matrix state cannot honour."""
    wide = [
        f"{name} of width {x.shape[3]} (at most {WIDEST})" for name, x in (("k", k), ("v", v)) if x.shape[3] > WIDEST
    ]
    return unfit({"k": k, "v": v, **others}, "float32", "bfloat16") + wide


def gate(documents: Documents | None, log_decay):
    """A log-decay, 0 at padding; per head float32 and within bounds, per channel as it is: kernels bound it."""
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = bounded_log_decay(log_decay, jnp.float32)
    return silence(documents, log_decay)


def along(value, chunk: int, width: int = LANES):
    """[B, T, H, W] as [B, T, H * W], filled up to whole chunks and multiples of `width`; and how it lies."""
    value = fill(fill(value, 1, chunk), 3, width)
    return value.reshape(*value.shape[:2], -1), Tokens(value.shape[3], value.shape[2])


def across(value, chunk: int, heads: int):
    """[B, T, H] as [B, H / heads, chunks, heads, chunk]; and how it lies."""
    value = fill(value, 1, chunk)
    batch, time, all_heads = value.shape
    value = value.reshape(batch, time // chunk, chunk, all_heads // heads, heads).transpose(0, 3, 1, 4, 2)
    return value, Tokens(heads, all_heads // heads, across=True)


def numbers(documents: Documents | None, chunk: int):
    """What `decay_tpu.masks` takes, for all chunks, and how it lies; None and None for a single document."""
    if documents is None:
        return None, None
    missing = filled(documents.number.shape[1], chunk) - documents.number.shape[1]
    number = jnp.pad(documents.number, ((0, 0), (0, missing)), mode="edge").astype(jnp.float32)
    before = jnp.pad(number[:, chunk - 1 : -1 : chunk], ((0, 0), (1, 0)))
    number = number.reshape(number.shape[0], -1, chunk)
    pair = jnp.stack([number, jnp.broadcast_to(before[..., None], number.shape)], axis=2)
    return pair[:, None], Tokens(2, across=True)


def side_by_side(state, heads: int, width: int):
    """States [B, H, K, V] as [B, H / heads, K, heads * V], K and V filled up to multiples of 128 and of `width`."""
    state = fill(fill(state, 2, LANES), 3, width)
    batch, all_heads, keys, values = state.shape
    state = state.reshape(batch, all_heads // heads, heads, keys, values).swapaxes(2, 3)
    return state.reshape(batch, all_heads // heads, keys, heads * values)


def separate(state, like):
    """The inverse of `side_by_side`."""
    batch, heads, keys, values = like.shape
    state = state.reshape(batch, state.shape[1], state.shape[2], heads // state.shape[1], -1).swapaxes(2, 3)
    return state.reshape(batch, heads, *state.shape[3:])[:, :, :keys, :values]
