"""The selective scan of Mamba: a diagonal state space model whose step and projections depend on the token."""

import jax

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import check_chunk_size, check_rank, check_shape, check_sign, initial, state_dtype
from kernels_pallas.dispatch import choose
from kernels_pallas.over_time import over_devices
from kernels_pallas.segments import check_segments, documents
from kernels_pallas.selective_scan import over_time, reference, xla
from kernels_pallas.target import current

_ROWS = ("batch", None, "heads")
_AXES = (_ROWS, _ROWS, ("heads",), ("batch",), ("batch",), ("heads",))


def _bucket(u, dt, A, B, C, D):
    return tuning.bucket(batch=u.shape[0], time=u.shape[1], channels=u.shape[2], state=B.shape[2])


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = h_t C_t + D u_t, per channel (arXiv 2312.00752).

    Args:
        u: [B, T, D] inputs. dt: [B, T, D] step sizes, at least 0: bias and softplus already applied.
        A: [D, N] decay rates, at most 0. B, C: [B, T, N] input and output projections. D: [D] skip weight.
        segment_ids: int [B, T], document of each token. 0 is padding: its output is zero and it leaves the state
            untouched. A token whose id differs from that of the last live token starts from a zero state; the first
            live token of a row continues `initial_state`.
        initial_state: [B, D, N], zeros if None.
        chunk_size: tokens between states that are kept for the gradient, in chunked implementations; changes no
            value. None: one that ran fast.
        implementation: "auto", "xla" (in chunks), "pallas" (a kernel, on TPUs and Hopper GPUs) or "reference"
            (token by token).

    Returns:
        y [B, T, D] in u's dtype, and the state [B, D, N] after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit; a negative `dt`, a positive `A` or ids that go back and forth, where the
            values can be seen. Under a transformation they cannot: signs are then taken for granted, and an id that
            comes back starts a new document.
    """
    op = "selective_scan"
    check_rank(op, "u", u, "batch, time, channels")
    check_rank(op, "B", B, "batch, time, state")
    (batch, time, channels), states = u.shape, B.shape[2]
    check_shape(op, "dt", dt, (batch, time, channels))
    check_shape(op, "A", A, (channels, states))
    check_shape(op, "B", B, (batch, time, states))
    check_shape(op, "C", C, (batch, time, states))
    check_shape(op, "D", D, (channels,))
    check_chunk_size(op, chunk_size)
    check_sign(op, "dt", dt, 1)
    check_sign(op, "A", A, -1)
    check_segments(op, segment_ids, batch, time)
    dtype = state_dtype(u, dt, A, B, C, D, initial_state)
    state = initial(op, initial_state, (batch, channels, states), dtype)
    if over_devices(time):

        def run(*inputs):
            *inputs, ids, start = inputs
            options = {"chunk_size": chunk_size, "implementation": implementation}
            return selective_scan(*inputs, segment_ids=ids, initial_state=start, **options)

        return over_time.selective_scan(run, u, dt, A, B, C, D, state, segment_ids)
    inputs, target = (u, dt, A, B, C, D), current()
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(*inputs), inputs, xla=[], reference=[]))
    rows = documents(segment_ids)
    if name == "pallas":
        outputs = _ROWS, ("batch", "heads")
        y, state = kernel.recurrent(op, target, _bucket, inputs, _AXES, state, rows, outputs, chunk_size)
    elif name == "xla":
        y, state = xla.selective_scan(u, dt, A, B, C, D, state, rows, chunk_size=chunk_size)
    else:
        y, state = reference.selective_scan(u, dt, A, B, C, D, state, rows)
    return y.astype(u.dtype), state
