"""The delta rule: a matrix state per head that corrects what it holds under a key, with or without decay."""

import jax

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import (
    check_chunk_size,
    check_heads,
    check_log_decay,
    check_shape,
    initial,
    state_dtype,
)
from kernels_pallas.delta_rule import over_time, reference, xla
from kernels_pallas.dispatch import choose
from kernels_pallas.over_time import over_devices
from kernels_pallas.segments import check_segments, documents
from kernels_pallas.target import current

_HEADS = ("batch", None, "heads")


def _bucket(q, k, v, beta, log_decay):
    sizes = {"batch": v.shape[0], "time": v.shape[1], "heads": v.shape[2], "key": k.shape[3], "value": v.shape[3]}
    per_channel = log_decay is not None and log_decay.ndim == 4
    return tuning.bucket(**sizes, decays=k.shape[3] if per_channel else 1)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """S_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) S_{t-1} + beta_t k_t v_tᵀ, y_t = S_tᵀ q_t, per head, without scale.

    Without decay it is DeltaNet (arXiv 2406.06484); with one per head gated DeltaNet (2412.06464); with one per
    channel Kimi delta attention (2510.26692). The decay acts before the correction.

    Args:
        q, k: [B, T, G, K] queries and keys; the caller makes keys of length 1, or at most 1. v: [B, T, H, V] values.
            H is a multiple of G: head h reads group h // (H // G).
        beta: [B, T, H] strength of the correction, within (0, 1), or (0, 2) for negative eigenvalues (2411.12537).
        log_decay: None, [B, T, H] or [B, T, H, K], at most 0.
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
    op = "delta_rule"
    batch, time, heads = check_heads(op, q, k, v)
    check_shape(op, "beta", beta, (batch, time, heads))
    check_log_decay(op, log_decay, q, v)
    check_chunk_size(op, chunk_size)
    check_segments(op, segment_ids, batch, time)
    dtype = state_dtype(q, k, v, beta, log_decay, initial_state)
    state = initial(op, initial_state, (batch, heads, k.shape[-1], v.shape[-1]), dtype)
    if over_devices(time):

        def run(*inputs):
            *inputs, ids, start = inputs
            options = {"chunk_size": chunk_size, "implementation": implementation}
            return delta_rule(*inputs, segment_ids=ids, initial_state=start, **options)

        return over_time.delta_rule(run, q, k, v, beta, log_decay, state, segment_ids)
    inputs, target = (q, k, v, beta, log_decay), current()
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(*inputs), inputs, xla=[], reference=[]))
    rows = documents(segment_ids)
    if name == "pallas":
        axes, outputs = [_HEADS] * 5, (_HEADS, ("batch", "heads"))
        y, state = kernel.recurrent(op, target, _bucket, inputs, axes, state, rows, outputs, chunk_size)
    elif name == "xla":
        y, state = xla.delta_rule(q, k, v, beta, log_decay, state, rows, chunk_size=chunk_size)
    else:
        y, state = reference.delta_rule(q, k, v, beta, log_decay, state, rows)
    return y.astype(v.dtype), state
