"""Linear attention on Hopper GPUs, without decay, with one per head or one per channel, in chunks of 64 tokens.

States go from chunk to chunk in one kernel, and all chunks read them at once in another: `kernels_pallas.chunk_states`.
Per head the latter forms the decayed products within chunks too; per channel another kernel does: `mosaic_gpu_channel`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_states.advance_gpu import Writes, advance
from kernels_pallas.chunk_states.decays import head_decays
from kernels_pallas.chunk_states.padding import TILE, Chunked, filled, over_group, widened
from kernels_pallas.chunk_states.read_gpu import Decayed, States, read
from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.dispatch import unfit
from kernels_pallas.linear_attention import mosaic_gpu_channel, reference

MULTIPROCESSORS = 132  # of an H100 or H200
WIDEST = 256
"""Of keys and values: the longest side of a tile that is loaded at once."""


def obstacles(q, k, v, log_decay) -> list[str]:
    """What of a call the kernels do not take."""
    reasons = unfit({"q": q, "k": k, "v": v}, "bfloat16") + unfit({"log_decay": log_decay}, "float32", "bfloat16")
    widths = {"key": k.shape[3], "value": v.shape[3]}
    return reasons + [f"a {name} width of {width} above {WIDEST}" for name, width in widths.items() if width > WIDEST]


CHOICES = {"heads": (1, 2, 4, 8, 16)}
"""Block sizes that tuning tries."""


def heuristic(q, k, v, log_decay) -> dict[str, int]:
    """Chunks of 64 tokens, the only size that the kernels have: the rows of one tensor core instruction.

    "heads" is how many heads of a group one block adds up in the gradients of q and k, which are written once for all
    of them: as many as leave four blocks for each of 132 multiprocessors, two that run and two that wait.
    """
    batch, time, groups, keys = k.shape
    repeats, blocks = v.shape[2] // groups, batch * -(-time // CHUNK) * v.shape[2] * -(-keys // TILE)
    most = max(1, blocks // (4 * MULTIPROCESSORS))
    return {"chunk": CHUNK, "heads": max(n for n in range(1, repeats + 1) if repeats % n == 0 and n <= most)}


def linear_attention(q, k, v, log_decay, state, documents, *, blocks, simulated):
    """q, k [B,T,G,K], v [B,T,H,V], log_decay None, [B,T,H] or [B,T,H,K], state [B,H,K,V] -> y [B,T,H,V], state.

    A single token is no work for the tensor cores: it is left to plain JAX.
    """
    time, keys, values = q.shape[1], q.shape[3], v.shape[3]
    if time == 1:
        return reference.linear_attention(q, k, v, log_decay, state, documents)
    q, k, v, log_decay = reference.prepare(documents, (q, k, v, log_decay), jnp.float32)
    q, k, v, state = widened(q, k, v, state)
    q, k, v, log_decay = (filled(value) for value in (q, k, v, log_decay))
    chunked = None if documents is None else Chunked.of(documents)
    if log_decay is not None and log_decay.ndim == 4:
        y, state = mosaic_gpu_channel.linear_attention(q, k, v, log_decay, state, chunked, simulated)
    else:
        summed = math.gcd(blocks["heads"], v.shape[2] // k.shape[2])
        y, state = _per_head(summed, simulated, q, k, v, log_decay, state, chunked)
    return y[:, :time, :, :values], state[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_head(summed, simulated, q, k, v, log_decay, state, documents):
    """Of whole chunks, widths multiples of 64, and log_decay None or float32 [B,T,H]."""
    return _forward(summed, simulated, q, k, v, log_decay, state, documents)[0]


def _forward(summed, simulated, q, k, v, log_decay, state, documents):
    sums, entering, leaving, whole = head_decays(log_decay, v, documents)
    going = advance(_per_key(whole, k), state, Writes(k, v, leaving), simulated=simulated)
    numbers = None if documents is None else documents.number
    near = Decayed(k, v, sums, numbers)
    y = read(q, States(going.states, rows=entering), near, heads=v.shape[2], simulated=simulated).out
    return (y, going.last), (q, k, v, log_decay, documents, going.states)


def _backward(summed, simulated, residuals, cotangents):
    q, k, v, log_decay, documents, states = residuals
    dy, dstate = cotangents
    sums, entering, leaving, whole = head_decays(log_decay, v, documents)
    numbers = None if documents is None else documents.number
    reading = functools.partial(read, heads=v.shape[2], simulated=simulated)
    decays = log_decay is not None
    back = advance(
        _per_key(whole, k),
        dstate,
        Writes(q, dy, entering),
        against=states if decays else None,
        reverse=True,
        simulated=simulated,
    )
    dv = reading(k, States(back.states, rows=leaving), Decayed(q, dy, sums, numbers), reverse=True).out
    own_q, own_k = (q, k) if decays else (None, None)
    turning = functools.partial(reading, summed=summed)
    dq, _, gains = turning(dy, States(states, True, entering), Decayed(v, k, sums, numbers), own=own_q)
    given = States(back.states, True, leaving)
    dk, _, losses = turning(v, given, Decayed(dy, q, sums, numbers), own=own_k, reverse=True)
    dlog_decay = None
    if decays:
        dlog_decay = _decay_gradient(gains, losses, whole * jnp.sum(back.kept, axis=-1))
    return over_group(dq, q), over_group(dk, k), dv, dlog_decay, back.last, None


_per_head.defvjp(_forward, _backward)


def _per_key(whole, k):
    return jnp.broadcast_to(whole[..., None], (*whole.shape, k.shape[3]))


def _decay_gradient(gains, losses, kept):
    """A decay scales all that is read after it of what was written before it, in its chunk and of the states.

    Args:
        gains, losses: float32 [2,B,H,N,C], of queries and keys: what each read or gave within the chunk, and what it
            read of the state in front of it or gave to the state after it.
        kept: float32 [B,N,H], what the state in front gave to the state after.
    """
    (read_inside, read_before), (given_inside, given_after) = gains, losses
    from_here = jnp.flip(jnp.cumsum(jnp.flip(read_inside - given_inside + read_before, 3), axis=3), 3)
    until_here = jnp.cumsum(given_after, axis=3) - given_after
    gradient = from_here + until_here + kept.swapaxes(1, 2)[..., None]
    return gradient.reshape(*gradient.shape[:2], -1).swapaxes(1, 2)
