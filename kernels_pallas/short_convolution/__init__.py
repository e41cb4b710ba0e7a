"""The short causal convolution in front of recurrent mixers: a few taps per channel."""

import jax

from kernels_pallas import kernel, tuning
from kernels_pallas.arguments import check_chunk_size, check_rank, check_shape, initial, state_dtype
from kernels_pallas.dispatch import choose
from kernels_pallas.over_time import over_devices
from kernels_pallas.segments import check_segments, documents, silence
from kernels_pallas.short_convolution import over_time, reference, xla
from kernels_pallas.target import current

_CHANNELS = ("batch", None, "heads")


def _bucket(x, w, bias):
    return tuning.bucket(batch=x.shape[0], time=x.shape[1], channels=x.shape[2], taps=w.shape[0])


def short_convolution(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """y_t = bias + sum_j w_j x_{t-W+1+j}, per channel: causal and depthwise, without activation.

    Args:
        x: [B, T, D] inputs. w: [W, D] taps, W at least 1; the last one meets the current token. bias: [D].
        segment_ids: int [B, T], document of each token. No tap reaches into another document. 0 is padding: its
            output is zero, and taps count live tokens only, as if padding were not there. The first live token of a
            row continues `initial_state`.
        initial_state: [B, W - 1, D] inputs before the first, the newest last; zeros if None.
        chunk_size: accepted as by the other recurrent operators; the work is not cut along time.
        implementation: "auto", "xla" (tap by tap), "pallas" (a kernel, on TPUs and Hopper GPUs) or "reference"
            (token by token).

    Returns:
        y [B, T, D] in x's dtype, and the last W - 1 live inputs of the last document [B, W - 1, D], zeros where it
        has fewer, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit; ids that go back and forth, where the values can be seen. Under a
            transformation they cannot: an id that comes back then starts a new document.
    """
    op = "short_convolution"
    check_rank(op, "x", x, "batch, time, channels")
    check_rank(op, "w", w, "taps, channels")
    (batch, time, channels), taps = x.shape, w.shape[0]
    if taps < 1:
        raise ValueError("short_convolution: w must have at least 1 tap, not 0")
    check_shape(op, "w", w, (taps, channels))
    check_shape(op, "bias", bias, (channels,))
    check_chunk_size(op, chunk_size)
    check_segments(op, segment_ids, batch, time)
    dtype = state_dtype(x, w, bias, initial_state)
    state = initial(op, initial_state, (batch, taps - 1, channels), dtype)
    if over_devices(time):

        def run(x, w, bias, ids, start):
            return short_convolution(x, w, bias, segment_ids=ids, initial_state=start, implementation=implementation)

        return over_time.short_convolution(run, x, w, bias, state, segment_ids)
    inputs, target = (x, w, bias), current()
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(*inputs), inputs, xla=[], reference=[]))
    rows = documents(segment_ids)
    if name == "pallas":
        axes = _CHANNELS, (None, "heads"), ("heads",)
        y, state = kernel.recurrent(op, target, _bucket, inputs, axes, state, rows, [_CHANNELS] * 2, chunk_size)
    else:
        run = xla.short_convolution if name == "xla" else reference.short_convolution
        y, state = run(x, w, bias, state, rows)
    return silence(rows, y.astype(x.dtype)), state
