"""The kernels of the linear recurrence on Hopper GPUs: a warpgroup has 128 channels, one in every thread.

Arrays: log_a (float32), x, y [B,T,G,128] of G groups of channels; states [B,...,G,128] in float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.scan_gpu import LOG2E, Plan, Stream, buffers, exp2, fold_tokens, launch

WIDTH = 128
_UNROLLED = 8
_LAYOUT = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)


def load(reference) -> jax.Array:
    """Values of the 128 channels, in float32."""
    return plgpu.load(reference, layout=_LAYOUT, optimized=False).astype(jnp.float32)


def decay(plan: Plan, log_a: jax.Array) -> jax.Array:
    """exp(log_a)."""
    return exp2(log_a * LOG2E, _LAYOUT, simulated=plan.simulated)


def scan(plan: Plan, log_a, x, entering, *, keep: bool):
    """Outputs and states of every span from its entering state [B,S,G,128].

    Returns:
        y in x's dtype; the states in front of the chunks [B,T/C,G,128] if `keep`, else None; the states after the
        spans [B,S,G,128].
    """

    def linear_recurrence_forward(r):
        row, group, span = plan.here()
        stream = Stream(plan, r, "log_a", "x")
        stream.start()

        def step(index, h):
            slot = stream.wait(index)
            if keep:
                r.states.at[row, stream.chunk(index), group][...] = h
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def token(t, h):
                h = decay(plan, load(r.log_a_.at[slot, t])) * h + load(r.x_.at[slot, t])
                r.y_.at[t][...] = h.astype(r.y_.dtype)
                return h

            h = fold_tokens(plan.chunk, token, h, unrolled=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.y_, r.y.at[row, stream.tokens(index), group])
            stream.release(index)
            return h

        first = load(r.entering.at[row, span, group])
        r.ends.at[row, span, group][...] = jax.lax.fori_loop(0, plan.length, step, first)
        plgpu.wait_smem_to_gmem(0)

    kept = jax.ShapeDtypeStruct((plan.batch, plan.spans * plan.length, *entering.shape[2:]), jnp.float32)
    results = launch(
        linear_recurrence_forward,
        {"log_a": log_a, "x": x, "entering": entering},
        {"y": _like(x), "states": kept if keep else None, "ends": _like(entering)},
        buffers(plan, log_a=log_a, x=x) | {"y_": plgpu.SMEM((plan.chunk, WIDTH), x.dtype)},
        plan.grid,
        simulated=plan.simulated,
    )
    return results["y"], results["states"], results["ends"]


def ends(plan: Plan, log_a, v, *, reverse: bool):
    """The end state of every span [B,S,G,128] from a zero state: h <- a h + v of the inputs v in the order of time, or,
    if `reverse`, the gradient h <- a (h + v) of the output gradients v against it."""

    def linear_recurrence_ends(r):
        row, group, span = plan.here()
        stream = Stream(plan, r, "log_a", "v", reverse=reverse)
        stream.start()

        def step(index, h):
            slot = stream.wait(index)

            def token(t, h):
                t = plan.chunk - 1 - t if reverse else t
                a, v = decay(plan, load(r.log_a_.at[slot, t])), load(r.v_.at[slot, t])
                return a * (h + v) if reverse else a * h + v

            h = fold_tokens(plan.chunk, token, h, unrolled=_UNROLLED)
            plgpu.commit_smem()
            stream.release(index)
            return h

        zeros = plgpu.layout_cast(jnp.zeros(WIDTH, jnp.float32), _LAYOUT)
        r.ends.at[row, span, group][...] = jax.lax.fori_loop(0, plan.length, step, zeros)

    return launch(
        linear_recurrence_ends,
        {"log_a": log_a, "v": v},
        {"ends": jax.ShapeDtypeStruct((plan.batch, plan.spans, plan.groups, WIDTH), jnp.float32)},
        buffers(plan, log_a=log_a, v=v),
        plan.grid,
        simulated=plan.simulated,
    )["ends"]


def gradients(plan: Plan, log_a, x, states, dy, entering):
    """The gradients of log_a and x, and of the states in front of the spans [B,S,G,128], given dy like x and the
    gradients [B,S,G,128] of the states after the spans.

    A chunk's products a_t h_{t-1} are computed anew from the state in front of it, into the buffer that the gradients
    of its log-decays, dh_t a_t h_{t-1}, then leave from.
    """

    def linear_recurrence_backward(r):
        row, group, span = plan.here()
        stream = Stream(plan, r, "log_a", "x", "dy", reverse=True)
        stream.start()

        def step(index, dh):
            h, tokens = load(r.states.at[row, stream.chunk(index), group]), stream.tokens(index)
            slot = stream.wait(index)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def recompute(t, h):
                kept = decay(plan, load(r.log_a_.at[slot, t])) * h
                r.dlog_a_.at[t][...] = kept
                return kept + load(r.x_.at[slot, t])

            def token(t, dh):
                t = plan.chunk - 1 - t
                dh = dh + load(r.dy_.at[slot, t])
                r.dx_.at[t][...] = dh.astype(r.dx_.dtype)
                r.dlog_a_.at[t][...] = dh * load(r.dlog_a_.at[t])
                return dh * decay(plan, load(r.log_a_.at[slot, t]))

            fold_tokens(plan.chunk, recompute, h, unrolled=_UNROLLED)
            dh = fold_tokens(plan.chunk, token, dh, unrolled=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.dlog_a_, r.dlog_a.at[row, tokens, group])
            plgpu.copy_smem_to_gmem(r.dx_, r.dx.at[row, tokens, group])
            stream.release(index)
            return dh

        last = load(r.entering.at[row, span, group])
        r.leaving.at[row, span, group][...] = jax.lax.fori_loop(0, plan.length, step, last)
        plgpu.wait_smem_to_gmem(0)

    memory = {name: plgpu.SMEM((plan.chunk, WIDTH), like.dtype) for name, like in (("dlog_a_", log_a), ("dx_", x))}
    results = launch(
        linear_recurrence_backward,
        {"log_a": log_a, "x": x, "dy": dy, "states": states, "entering": entering},
        {"dlog_a": _like(log_a), "dx": _like(x), "leaving": _like(entering)},
        buffers(plan, log_a=log_a, x=x, dy=dy) | memory,
        plan.grid,
        simulated=plan.simulated,
    )
    return results["dlog_a"], results["dx"], results["leaving"]


def _like(value):
    return jax.ShapeDtypeStruct(value.shape, value.dtype)
