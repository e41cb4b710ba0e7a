"""Forward kernels of the selective scan on Hopper GPUs: outputs, and the end states of spans in either direction.

Arrays are cut as in `mosaic_gpu_plan`: u, dt, y [B,T,G,W] (G groups of W channels), projections [B,T,2N] (B, then C),
marks [B,T] (`scan_gpu.RESET` where a document starts, else 0; or None), A [G,N,W] in base 2, D [G,W],
states [B,...,G,N,W] in float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.scan_gpu import Stream, buffers, fold_tokens, launch
from kernels_pallas.selective_scan.mosaic_gpu_plan import Plan


def scan(plan: Plan, u, dt, projections, marks, A, D, entering, *, keep: bool):
    """Outputs and states of every span from its entering state [B,S,G,N,W].

    Returns:
        y in u's dtype; the states in front of the chunks [B,T/C,G,N,W] if `keep`, else None; the states after the
        spans [B,S,G,N,W].
    """

    def selective_scan_forward(r):
        row, groups, span = plan.here()
        stream = Stream(plan, r, "u", "dt", "projections", "marks")
        stream.start()
        A, D = plan.load(r.A.at[groups]), plan.channel(r.D.at[groups])

        def step(index, h):
            slot = stream.wait(index)
            if keep:
                r.states.at[row, stream.chunk(index), groups][...] = h
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def token(t, h):
                u, dt = plan.channel(r.u_.at[slot, t]), plan.channel(r.dt_.at[slot, t])
                B, C = (plan.state(r.projections_.at[slot, t, pl.ds(i * plan.states, plan.states)]) for i in (0, 1))
                mark = None if marks is None else r.marks_[slot, t]
                h = plan.decay(dt, A, mark) * h + plan.spread(dt * u) * B
                r.y_.at[t][...] = (jnp.sum(h * C, axis=1) + D * u).astype(r.y_.dtype)
                return h

            h = fold_tokens(plan.chunk, token, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.y_, r.y.at[row, stream.tokens(index), groups])
            stream.release(index)
            return h

        r.ends.at[row, span, groups][...] = jax.lax.fori_loop(
            0, plan.length, step, plan.load(r.entering.at[row, span, groups])
        )
        plgpu.wait_smem_to_gmem(0)

    inputs = {"u": u, "dt": dt, "projections": projections, "marks": marks, "A": A, "D": D, "entering": entering}
    kept = (plan.batch, plan.spans * plan.length, *entering.shape[2:])
    results = launch(
        selective_scan_forward,
        inputs,
        {
            "y": jax.ShapeDtypeStruct(u.shape, u.dtype),
            "states": jax.ShapeDtypeStruct(kept, jnp.float32) if keep else None,
            "ends": jax.ShapeDtypeStruct(entering.shape, jnp.float32),
        },
        buffers(plan, u=u, dt=dt, projections=projections, marks=marks)
        | {"y_": plgpu.SMEM((plan.chunk, *plan.own), u.dtype)},
        plan.grid,
        simulated=plan.simulated,
    )
    return results["y"], results["states"], results["ends"]


def ends(plan: Plan, v, dt, projections, marks, A, *, reverse: bool):
    """The end state of every span [B,S,G,N,W] from a zero state: h <- a h + dt v B of the inputs v in the order of
    time, or, if `reverse`, the gradient h <- a (h + v C) of the output gradients v against it."""

    def selective_scan_ends(r):
        row, groups, span = plan.here()
        stream = Stream(plan, r, "v", "dt", "projections", "marks", reverse=reverse)
        stream.start()
        A = plan.load(r.A.at[groups])

        def step(index, h):
            slot = stream.wait(index)

            def token(t, h):
                t = plan.chunk - 1 - t if reverse else t
                v, dt = plan.channel(r.v_.at[slot, t]), plan.channel(r.dt_.at[slot, t])
                decay = plan.decay(dt, A, None if marks is None else r.marks_[slot, t])
                where = pl.ds(plan.states if reverse else 0, plan.states)
                projection = plan.state(r.projections_.at[slot, t, where])
                if reverse:
                    return decay * (h + plan.spread(v) * projection)
                return decay * h + plan.spread(dt * v) * projection

            h = fold_tokens(plan.chunk, token, h)
            plgpu.commit_smem()
            stream.release(index)
            return h

        zeros = plgpu.layout_cast(jnp.zeros(plan.tile, jnp.float32), plan.layout)
        r.ends.at[row, span, groups][...] = jax.lax.fori_loop(0, plan.length, step, zeros)

    shape = (plan.batch, plan.spans, *A.shape)
    return launch(
        selective_scan_ends,
        {"v": v, "dt": dt, "projections": projections, "marks": marks, "A": A},
        {"ends": jax.ShapeDtypeStruct(shape, jnp.float32)},
        buffers(plan, v=v, dt=dt, projections=projections, marks=marks),
        plan.grid,
        simulated=plan.simulated,
    )["ends"]
