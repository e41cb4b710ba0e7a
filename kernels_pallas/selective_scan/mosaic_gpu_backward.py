"""Backward kernel of the selective scan on Hopper GPUs. Arrays are as in `mosaic_gpu_forward`.

A span's chunks are walked from the last to the first, and the states of a chunk computed anew twice: first along the
whole chunk, to put those in front of its parts into shared memory; then part by part, from the last one, where decays
a_t and products a_t h_{t-1} stay in registers until the gradient, coming from the end, has used them. An exponential is
so computed less than twice.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.scan_gpu import Stream, buffers, launch
from kernels_pallas.selective_scan.mosaic_gpu_plan import WARPS, Plan

_LN2 = math.log(2)


def gradients(plan: Plan, u, dt, projections, marks, A, D, states, dy, entering):
    """Gradients, given dy like u and the gradients [B,S,G,N,W] of the states after the spans.

    Returns a dictionary:
        du, ddt: like u, dt. dprojections [G/4,B,T,2N], dA [B,S,G,N,W] and dD [B,S,G,W]: float32, to be summed over
        their leading axes. leaving [B,S,G,N,W]: of the states in front of the spans.
    """

    def selective_scan_backward(r):
        row, groups, span = plan.here()
        stream = Stream(plan, r, "u", "dt", "dy", "projections", "marks", reverse=True)
        stream.start()
        A, D = plan.load(r.A.at[groups]), plan.channel(r.D.at[groups])

        def step(index, sums):
            before, tokens = plan.load(r.states.at[row, stream.chunk(index), groups]), stream.tokens(index)
            current = _Chunk(plan, r, stream.wait(index), A, D)
            current.advance(before)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sums = jax.lax.fori_loop(0, plan.chunk // plan.part, current.part, sums)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.du_, r.du.at[row, tokens, groups])
            plgpu.copy_smem_to_gmem(r.ddt_, r.ddt.at[row, tokens, groups])
            stream.release(index)
            dprojections = sum((r.dprojections_[warp] for warp in range(1, WARPS)), r.dprojections_[0])
            r.dprojections.at[jax.lax.axis_index("group"), row, tokens][...] = dprojections
            return sums

        zeros = plgpu.layout_cast(jnp.zeros(plan.tile, jnp.float32), plan.layout)
        dD = plgpu.layout_cast(jnp.zeros((WARPS, plan.width), jnp.float32), plan.layout.reduce(1))
        sums = plan.load(r.entering.at[row, span, groups]), zeros, dD
        dh, dA, dD = jax.lax.fori_loop(0, plan.length, step, sums)
        r.leaving.at[row, span, groups][...] = dh
        r.dA.at[row, span, groups][...] = dA * _LN2
        r.dD.at[row, span, groups][...] = dD
        plgpu.wait_smem_to_gmem(0)

    def like(value, *shape):
        return jax.ShapeDtypeStruct(shape or value.shape, value.dtype)

    chunk = plan.chunk, *plan.own
    streamed = {"u": u, "dt": dt, "dy": dy, "projections": projections, "marks": marks}
    sums = plan.groups // WARPS, *projections.shape
    return launch(
        selective_scan_backward,
        streamed | {"A": A, "D": D, "states": states, "entering": entering},
        {
            "du": like(u),
            "ddt": like(dt),
            "dprojections": like(projections, *sums),
            "dA": like(entering),
            "dD": like(D, *entering.shape[:2], *D.shape),
            "leaving": like(entering),
        },
        buffers(plan, **streamed)
        | {
            "du_": plgpu.SMEM(chunk, u.dtype),
            "ddt_": plgpu.SMEM(chunk, dt.dtype),
            "dprojections_": plgpu.SMEM((WARPS, plan.chunk, 2 * plan.states), jnp.float32),
            "parts_": plgpu.SMEM((plan.chunk // plan.part, *plan.tile), jnp.float32),
        },
        plan.grid,
        simulated=plan.simulated,
    )


class _Chunk:
    """One chunk of a block, in place `slot` of the buffers."""

    def __init__(self, plan: Plan, r, slot, A, D):
        self.plan, self.r, self.slot, self.A, self.D = plan, r, slot, A, D

    def _channel(self, name, t):
        return self.plan.channel(getattr(self.r, f"{name}_").at[self.slot, t])

    def _projection(self, which, t):
        states = self.plan.states
        return self.plan.state(self.r.projections_.at[self.slot, t, pl.ds(which * states, states)])

    def _recur(self, t, h):
        """a_t, a_t h_{t-1} and h_t."""
        u, dt = self._channel("u", t), self._channel("dt", t)
        a = self.plan.decay(dt, self.A, None if self.r.marks is None else self.r.marks_[self.slot, t])
        kept = a * h
        return a, kept, kept + self.plan.spread(dt * u) * self._projection(0, t)

    def advance(self, h):
        """Write the states in front of the parts, the first of them `h`."""
        plan, r = self.plan, self.r

        def part(i, h):
            for j in range(plan.part):
                _, _, h = self._recur(i * plan.part + j, h)
            r.parts_.at[i + 1][...] = h
            return h

        r.parts_.at[0][...] = h
        jax.lax.fori_loop(0, plan.chunk // plan.part - 1, part, h)

    def part(self, index, sums):
        """The gradients of a part, the last one for index 0; sums are those of the state, A and D."""
        plan = self.plan
        number = plan.chunk // plan.part - 1 - index
        h, memory = plan.load(self.r.parts_.at[number]), []
        for j in range(plan.part):
            t = number * plan.part + j
            a, kept, h = self._recur(t, h)
            dC = jnp.sum(h * plan.spread(self._channel("dy", t)), axis=2)
            self.r.dprojections_.at[:, t, pl.ds(plan.states, plan.states)][...] = dC
            memory.append((a, kept))
        for j in reversed(range(plan.part)):
            sums = self._token(number * plan.part + j, *memory[j], *sums)
        return sums

    def _token(self, t, a, kept, dh, dA, dD):
        plan, r = self.plan, self.r
        u, dt, dy = (self._channel(name, t) for name in ("u", "dt", "dy"))
        dh = dh + plan.spread(dy) * self._projection(1, t)
        dB = jnp.sum(dh * plan.spread(dt * u), axis=2)
        r.dprojections_.at[:, t, pl.ds(0, plan.states)][...] = dB
        dinput = jnp.sum(dh * self._projection(0, t), axis=1)
        dexponent = dh * kept
        r.du_.at[t][...] = (dt * dinput + self.D * dy).astype(r.du_.dtype)
        r.ddt_.at[t][...] = (u * dinput + _LN2 * jnp.sum(dexponent * self.A, axis=1)).astype(r.ddt_.dtype)
        return dh * a, dA + dexponent * plan.spread(dt), dD + u * dy
