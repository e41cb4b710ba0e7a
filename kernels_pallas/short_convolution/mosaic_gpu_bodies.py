"""The kernels of the short convolution on Hopper GPUs: a block walks along one span of some channels.

Taps are counted by distance: w[d] meets the input d tokens before, W of them. Arrays: x, y [B,T,G,C] (G groups of C
channels), reach [B,T] (how many of the inputs before it a token sees, float32; or None for all), w [W,G,C] and
bias [G,C] in float32, state [B,W-1,G,C] in float32, the newest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import scan_gpu
from kernels_pallas.scan_gpu import Stream, buffers, fold_tokens, launch

_UNROLLED = 8


@dataclass(frozen=True, kw_only=True)
class Plan(scan_gpu.Plan):
    """Sizes of one call, all after padding.

    Attributes:
        width: 128 or 256: one channel or two in every thread.
        taps: W, at least 2.
    """

    taps: int

    @property
    def layout(self):
        """Of channels in registers."""
        return plgpu.Layout.WG_STRIDED((self.width,), vec_size=self.width // 128)

    def load(self, reference) -> jax.Array:
        """Values of the block's channels, in float32."""
        return plgpu.load(reference, layout=self.layout, optimized=False).astype(jnp.float32)

    def zeros(self) -> jax.Array:
        """Zeros of the block's channels."""
        return plgpu.layout_cast(jnp.zeros(self.width, jnp.float32), self.layout)


def convolve(plan: Plan, x, w, bias, state, reach):
    """y [B,T,G,C] in x's dtype: bias + sum_d w[d] x_{t-d} over the inputs that token t sees."""

    def short_convolution_forward(r):
        row, group, span = plan.here()
        stream = Stream(plan, r, "x", "reach")
        stream.start()
        w, bias = [plan.load(r.w.at[d, group]) for d in range(plan.taps)], plan.load(r.bias.at[group])
        before = []
        for d in range(1, plan.taps):
            other = plan.load(r.x.at[row, jnp.maximum(span * plan.length * plan.chunk - d, 0), group])
            before.append(_where(span == 0, plan.load(r.state.at[row, d - 1, group]), other))

        def step(index, before):
            slot = stream.wait(index)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def token(t, before):
                seen = [plan.load(r.x_.at[slot, t]), *before]
                y = bias + w[0] * seen[0]
                for d, value in enumerate(seen[1:], 1):
                    if reach is not None:
                        value = _where(r.reach_[slot, t] >= d, value, plan.zeros())
                    y = y + w[d] * value
                r.y_.at[t][...] = y.astype(r.y_.dtype)
                return seen[:-1]

            before = fold_tokens(plan.chunk, token, before, unrolled=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.y_, r.y.at[row, stream.tokens(index), group])
            stream.release(index)
            return before

        jax.lax.fori_loop(0, plan.length, step, before)
        plgpu.wait_smem_to_gmem(0)

    return launch(
        short_convolution_forward,
        {"x": x, "w": w, "bias": bias, "state": state, "reach": reach},
        {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        buffers(plan, x=x, reach=reach) | {"y_": plgpu.SMEM((plan.chunk, plan.width), x.dtype)},
        plan.grid,
        simulated=plan.simulated,
    )["y"]


def _where(condition, value, other):
    """One of two vectors; `condition` is one number."""
    return jnp.where(jnp.broadcast_to(condition, value.shape), value, other)


def gradients(plan: Plan, x, w, state, reach, dy):
    """dx like x; and in float32 dw [B,S,W,G,C] and dbias [B,S,G,C], to be summed over their leading axes, and dstate
    [B,W-1,G,C].

    From the last token on, a block carries the gradients of the outputs after the current token that see it: after
    one more token, those that do not reach that far are dropped.
    """

    def short_convolution_backward(r):
        row, group, span = plan.here()
        stream = Stream(plan, r, "x", "dy", "reach", reverse=True)
        stream.start()
        w = [plan.load(r.w.at[d, group]) for d in range(plan.taps)]
        taps = _Taps(plan, w, reach is not None)
        after = taps.none()
        end = (span + 1) * plan.length * plan.chunk
        for d in reversed(range(1, plan.taps)):
            at = jnp.minimum(end + d - 1, plan.time - 1)
            dy = _where(span == plan.spans - 1, plan.zeros(), plan.load(r.dy.at[row, at, group]))
            after = taps.moved(dy, None if reach is None else r.reach[row, at], after)

        def step(index, carry):
            slot, tokens = stream.wait(index), stream.tokens(index)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def token(t, carry):
                t = plan.chunk - 1 - t
                after, dw, dbias = carry
                dy = plan.load(r.dy_.at[slot, t])
                dx, dw = taps.gradients(plan.load(r.x_.at[slot, t]), [dy, *after[0]], dw)
                r.dx_.at[t][...] = dx.astype(r.dx_.dtype)
                return taps.moved(dy, None if reach is None else r.reach_[slot, t], after), dw, dbias + dy

            carry = fold_tokens(plan.chunk, token, carry, unrolled=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.dx_, r.dx.at[row, tokens, group])
            stream.release(index)
            return carry

        carry = after, [plan.zeros()] * plan.taps, plan.zeros()
        after, dw, dbias = jax.lax.fori_loop(0, plan.length, step, carry)
        for d in range(1, plan.taps):
            given = _where(span == 0, plan.load(r.state.at[row, d - 1, group]), plan.zeros())
            dstate, dw = taps.gradients(given, [plan.zeros(), *after[0]], dw)
            r.dstate.at[row, span, d - 1, group][...] = dstate
            after = taps.moved(plan.zeros(), None if reach is None else jnp.float32(0), after)
        for d in range(plan.taps):
            r.dw.at[row, span, d, group][...] = dw[d]
        r.dbias.at[row, span, group][...] = dbias
        plgpu.wait_smem_to_gmem(0)

    def partial(*kind: int):
        return jax.ShapeDtypeStruct((plan.batch, plan.spans, *kind, plan.groups, plan.width), jnp.float32)

    results = launch(
        short_convolution_backward,
        {"x": x, "dy": dy, "w": w, "state": state, "reach": reach},
        {
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dw": partial(plan.taps),
            "dbias": partial(),
            "dstate": partial(plan.taps - 1),
        },
        buffers(plan, x=x, dy=dy, reach=reach) | {"dx_": plgpu.SMEM((plan.chunk, plan.width), x.dtype)},
        plan.grid,
        simulated=plan.simulated,
    )
    return results["dx"], results["dw"], results["dbias"], results["dstate"][:, 0]


@dataclass(frozen=True)
class _Taps:
    """The taps of a block, and the gradients of the outputs 1, ..., W - 1 tokens after an input that see it, with the
    reaches of those tokens (none if all reach all)."""

    plan: Plan
    w: Sequence[jax.Array]
    limited: bool

    def none(self):
        """Where no token comes after."""
        later = range(1, self.plan.taps)
        return [self.plan.zeros() for _ in later], [jnp.float32(0) for _ in later] if self.limited else []

    def moved(self, dy, reach, after):
        """From behind a token with the gradient `dy` to the one before it."""
        gradients, reaches = after
        gradients = [dy, *gradients[:-1]]
        if not self.limited:
            return gradients, []
        reaches = [reach, *reaches[:-1]]
        seen = [
            _where(reach >= d, value, self.plan.zeros())
            for d, (value, reach) in enumerate(zip(gradients, reaches, strict=True), 1)
        ]
        return seen, reaches

    def gradients(self, x, seen, dw):
        """Of an input x that the outputs with the gradients `seen` see, and the sums over inputs for the taps."""
        dx = sum((tap * dy for tap, dy in zip(self.w[1:], seen[1:], strict=True)), self.w[0] * seen[0])
        return dx, [total + x * dy for total, dy in zip(dw, seen, strict=True)]
