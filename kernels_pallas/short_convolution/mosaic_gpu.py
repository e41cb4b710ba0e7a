"""The short convolution as Mosaic GPU kernels for Hopper: channels across threads, each input read once per pass.

Padding inside of a row is moved to its end before, in XLA, so that taps count live tokens; the last inputs, which are
the state, are picked there too. The length is cut into spans, each of which first looks at the few tokens next to it.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import unfit
from kernels_pallas.scan_gpu import cut, fill
from kernels_pallas.segments import silence
from kernels_pallas.short_convolution import mosaic_gpu_bodies, xla
from kernels_pallas.short_convolution.mosaic_gpu_bodies import Plan

_MOST_TAPS = 16  # their sums, and the outputs that see an input, stay in registers


def obstacles(x, w, bias) -> list[str]:
    """What of the inputs the kernels do not take."""
    many = [f"{w.shape[0]} taps (at most {_MOST_TAPS})"] * (w.shape[0] > _MOST_TAPS)
    return unfit({"x": x, "w": w, "bias": bias}, "float32", "bfloat16") + many


CHOICES = {"chunk": (8, 16, 32, 64), "length": (4, 8, 16, 32)}
"""Block sizes that tuning tries."""


def heuristic(x, w, bias) -> dict[str, int]:
    """chunk and length, see `Plan`.

    Chunks of 8 KiB, so that five blocks of the backward pass share a multiprocessor, each with two chunks on their way;
    spans of sixteen, of which the tokens looked at twice are about one in a hundred.
    """
    return {"chunk": 32 // x.dtype.itemsize, "length": 16}


def short_convolution(x, w, bias, state, documents, *, blocks, simulated):
    """x [B,T,D], w [W,D], bias [D] or None, state [B,W-1,D], documents or None.

    Returns y [B,T,D] in x's dtype, not silenced at padding, and the state.
    """
    (batch, time, channels), taps = x.shape, w.shape[0]
    if time == 1 or taps == 1:
        return xla.short_convolution(x, w, bias, state, documents)
    width = 128 if channels % 256 else 256
    chunk = max(8, min(blocks["chunk"], 64) // 8 * 8)
    chunks = -(-time // chunk)
    length, spans = cut(time, chunk, -(-chunks // blocks["length"]))
    plan = Plan(
        batch=batch,
        groups=-(-channels // width),
        width=width,
        chunk=chunk,
        length=length,
        spans=spans,
        simulated=simulated,
        taps=taps,
    )
    moved, number, _ = xla.in_order(silence(documents, x), documents)
    return _convolve(plan, x, w, bias, state, documents), xla.last_inputs(moved, state, number, documents)


def _arranged(plan: Plan, x, w, bias, state, documents):
    """What the kernels take of the inputs, and the way back for what is laid out like x."""
    (_, time, channels), taps = x.shape, plan.taps
    x, number, back = xla.in_order(silence(documents, x), documents)
    reach = None if number is None else fill(xla.reach(number, taps), axis1=plan.time)
    bias = jnp.zeros(channels, jnp.float32) if bias is None else bias.astype(jnp.float32)
    newest_first = w.astype(jnp.float32)[::-1], bias, state.astype(jnp.float32)[:, ::-1]
    values = plan.tokens(x), *map(plan.grouped, newest_first)
    return values, reach, lambda y: back(y.reshape(*y.shape[:2], -1)[:, :time, :channels])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: Plan, x, w, bias, state, documents):
    values, reach, back = _arranged(plan, x, w, bias, state, documents)
    return back(mosaic_gpu_bodies.convolve(plan, *values, reach))


def _forward(plan, *inputs):
    return _convolve(plan, *inputs), inputs


def _backward(plan, inputs, dy):
    *values, documents = inputs
    (x, w, _, state), pull, reach = jax.vjp(lambda *v: _arranged(plan, *v, documents)[:2], *values, has_aux=True)
    dy, _, _ = xla.in_order(silence(documents, dy), documents)
    dx, dw, dbias, dstate = mosaic_gpu_bodies.gradients(plan, x, w, state, reach, plan.tokens(dy))
    return *pull((dx, dw.sum((0, 1)), dbias.sum((0, 1)), dstate)), None


_convolve.defvjp(_forward, _backward)
