"""Linear attention: a matrix state per head with no decay, one per head, or one per head and key channel."""

import jax
import jax.numpy as jnp

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import (
    check_chunk_size,
    check_heads,
    check_log_decay,
    initial,
    state_dtype,
)
from kernels_pallas.dispatch import choose
from kernels_pallas.linear_attention import over_time, reference, xla
from kernels_pallas.over_time import over_devices
from kernels_pallas.segments import check_segments, documents
from kernels_pallas.target import current

_HEADS = ("batch", None, "heads")


def _bucket(q, k, v, log_decay):
    sizes = {"batch": v.shape[0], "time": v.shape[1], "heads": v.shape[2], "key": k.shape[3], "value": v.shape[3]}
    per_channel = log_decay is not None and log_decay.ndim == 4
    return tuning.bucket(**sizes, decays=k.shape[3] if per_channel else 1)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, per head, without scale or normaliser.

    Without decay it is the linear transformer (arXiv 2006.16236); with one per head RetNet (2307.08621), lightning
    attention (2401.04658) and, with q = C, k = B, v = dt x, log_decay = dt A, Mamba-2 (2405.21060); with one per
    channel GLA (2312.06635) and HGRN2 (2404.07904).

    Args:
        q, k: [B, T, G, K] queries and keys. v: [B, T, H, V] values. H is a multiple of G: head h reads group
            h // (H // G).
        log_decay: None, [B, T, H], [B, T, H, K], or [H] for one that does not change; at most 0. It is applied before
            the token's own key and value are added.
        segment_ids: int [B, T], document of each token. 0 is padding: its output is zero and it leaves the state
            untouched. A token whose id differs from that of the last live token starts from a zero state; the first
            live token of a row continues `initial_state`.
        initial_state: [B, H, K, V], zeros if None.
        chunk_size: tokens that are computed together, in chunked implementations; changes no value. None: one that
            ran fast.
        implementation: "auto", "xla" (in chunks), "pallas" (a kernel, on TPUs and Hopper GPUs) or "reference"
            (token by token).

    Returns:
        y [B, T, H, V] in v's dtype, and the state [B, H, K, V] after the last token, float32 (float64 for float64
        inputs).

    Raises:
        ValueError: shapes that do not fit; a positive `log_decay` or ids that go back and forth, where the values can
            be seen. Under a transformation they cannot: a positive `log_decay` then counts as 0, and an id that comes
            back starts a new document. Whatever `exp` takes to 0 (also -inf) forgets all.
    """
    op = "linear_attention"
    batch, time, heads = check_heads(op, q, k, v)
    check_log_decay(op, log_decay, q, v, constant=True)
    check_chunk_size(op, chunk_size)
    check_segments(op, segment_ids, batch, time)
    dtype = state_dtype(q, k, v, log_decay, initial_state)
    state = initial(op, initial_state, (batch, heads, k.shape[-1], v.shape[-1]), dtype)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, time, heads))
    if over_devices(time):

        def run(*inputs):
            *inputs, ids = inputs
            return linear_attention(*inputs, segment_ids=ids, chunk_size=chunk_size, implementation=implementation)

        return over_time.linear_attention(run, q, k, v, log_decay, state, segment_ids)
    inputs, target = (q, k, v, log_decay), current()
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(*inputs), inputs, xla=[], reference=[]))
    rows = documents(segment_ids)
    if name == "pallas":
        axes, outputs = [_HEADS] * 4, (_HEADS, ("batch", "heads"))
        y, state = kernel.recurrent(op, target, _bucket, inputs, axes, state, rows, outputs, chunk_size)
    elif name == "xla":
        y, state = xla.linear_attention(q, k, v, log_decay, state, rows, chunk_size=chunk_size)
    else:
        y, state = reference.linear_attention(q, k, v, log_decay, state, rows)
    return y.astype(v.dtype), state
