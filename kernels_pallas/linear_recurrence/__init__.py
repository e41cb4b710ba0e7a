"""The linear recurrence of gated recurrent networks: one number of state per channel."""

import jax

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import (
    check_chunk_size,
    check_rank,
    check_shape,
    check_sign,
    initial,
    state_dtype,
)
from kernels_pallas.dispatch import choose
from kernels_pallas.linear_recurrence import over_time, reference, xla
from kernels_pallas.over_time import over_devices
from kernels_pallas.segments import check_segments, documents, silence
from kernels_pallas.target import current

_CHANNELS = ("batch", None, "heads")


def _bucket(log_a, x):
    return tuning.bucket(batch=x.shape[0], time=x.shape[1], channels=x.shape[2])


def linear_recurrence(
    log_a: jax.Array,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(log_a_t) h_{t-1} + x_t, per channel.

    The core of RG-LRU (arXiv 2402.19427), HGRN (2311.04823), minGRU (2410.01201) and MLGRU (2406.02528). The decay is
    given by its logarithm because a bfloat16 number close to 1 loses how long the memory is.

    Args:
        log_a: [B, T, D] logarithm of the decay, at most 0. x: [B, T, D] inputs.
        segment_ids: int [B, T], document of each token. 0 is padding: its output is zero and it leaves the state
            untouched. A token whose id differs from that of the last live token starts from a zero state; the first
            live token of a row continues `initial_state`.
        initial_state: [B, D], zeros if None.
        chunk_size: tokens between states that are kept for the gradient, in chunked implementations; changes no
            value. None: one that ran fast.
        implementation: "auto", "xla" (in chunks), "pallas" (a kernel, on TPUs and Hopper GPUs) or "reference"
            (token by token).

    Returns:
        h [B, T, D] in x's dtype, and the state [B, D] after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit; a positive `log_a` or ids that go back and forth, where the values can be
            seen. Under a transformation they cannot: a positive `log_a` then counts as 0, and an id that comes back
            starts a new document. Whatever `exp` takes to 0 (also -inf) forgets all.
    """
    op = "linear_recurrence"
    check_rank(op, "x", x, "batch, time, channels")
    batch, time, channels = x.shape
    check_shape(op, "log_a", log_a, x.shape)
    check_chunk_size(op, chunk_size)
    check_sign(op, "log_a", log_a, -1)
    check_segments(op, segment_ids, batch, time)
    dtype = state_dtype(log_a, x, initial_state)
    state = initial(op, initial_state, (batch, channels), dtype)
    if over_devices(time):

        def run(log_a, x, ids):
            return linear_recurrence(log_a, x, segment_ids=ids, chunk_size=chunk_size, implementation=implementation)

        return over_time.linear_recurrence(run, log_a, x, state, segment_ids)
    inputs, target = (log_a, x), current()
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(*inputs), inputs, xla=[], reference=[]))
    rows = documents(segment_ids)
    if name == "pallas":
        axes, outputs = [_CHANNELS] * 2, (_CHANNELS, ("batch", "heads"))
        h, state = kernel.recurrent(op, target, _bucket, inputs, axes, state, rows, outputs, chunk_size)
    elif name == "xla":
        h, state = xla.linear_recurrence(log_a, x, state, rows, chunk_size=chunk_size)
    else:
        h, state = reference.linear_recurrence(log_a, x, state, rows)
    return silence(rows, h.astype(x.dtype)), state
