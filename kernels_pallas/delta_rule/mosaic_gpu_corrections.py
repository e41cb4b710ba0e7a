"""What the corrections of a chunk are made of, on Hopper GPUs: W = X (a ∘ k) and U = X (b ∘ v), X the inverse.

Keys and values are multiplied as they are, in bfloat16; all else goes into the columns of X, split into two bfloat16
numbers, since the rows of X cancel when keys are nearly parallel. The gradient is that of solving the system, not of
inverting it: R = Xᵀ dW is the gradient of a ∘ k, and that of the system is -R Wᵀ below the diagonal, both summed over
the two solutions. Widths are walked in tiles.

    X [64,64] float32 ──split──▶ hi, lo [64,64] bfloat16 in shared memory
    k tile [64,128] ─▶ hi k + lo k ─▶ W tile             (a block of threads: one chunk of one head)
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    WGMMA,
    along_columns,
    along_rows,
    floats,
    product,
    tile,
    vector,
)
from kernels_pallas.delta_rule.mosaic_gpu_inverse import inverse
from kernels_pallas.hopper import interpreted

_F32, _BF16 = jnp.float32, jnp.bfloat16
_GRID = ("batch", "chunk", "head")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def corrections(upper, key_scale, value_scale, k, v, simulated):
    """W and U of every chunk; differentiable in all arrays.

    Args:
        upper: float32 [B, N, H, 64, 64], above the diagonal the transposed systems diag(beta) A; T is 64 N.
        key_scale, value_scale: float32 [B, N, H, 64], a and b above.
        k: bfloat16 [B, T, G, K]. v: bfloat16 [B, T, H, V]. Both widths are multiples of 64.

    Returns:
        W bfloat16 [B, T, H, K], U bfloat16 [B, T, H, V].
    """
    return _forward(upper, key_scale, value_scale, k, v, simulated)[0]


def _forward(upper, key_scale, value_scale, k, v, simulated):
    x = inverse(upper, simulated=simulated)
    solved = _solutions(x, key_scale, value_scale, k, v, simulated)
    return solved, (x, key_scale, value_scale, k, v, *solved)


def _backward(simulated, residuals, cotangents):
    return _gradients(*residuals, *cotangents, simulated)


corrections.defvjp(_forward, _backward)


def _columns(k, v):
    """How many columns of keys and values are loaded at a time."""
    return math.gcd(128, k.shape[3], v.shape[3])


def _kernel(name, body, simulated, outputs, scratch, shape):
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=shape,
        grid_names=_GRID,
        scratch_types=scratch,
        kernel_name=name,
        interpret=interpreted(simulated),
    )


def _parts(repeats, width, *arrays):
    """This block's slices of arrays [B,T,heads,width], some columns at a time; the first array has a head per group."""
    batch, chunk, head = (jax.lax.axis_index(name) for name in _GRID)
    rows = pl.ds(chunk * CHUNK, CHUNK)
    for start in range(0, arrays[0].shape[3], width):
        columns = pl.ds(start, width)
        yield [x.at[batch, rows, head if i else head // repeats, columns] for i, x in enumerate(arrays)]


def _split(x, hi, lo):
    """Write float32 x as a sum of two bfloat16 numbers; what they leave out is 2^-17 of it."""
    upper = x.astype(_BF16)
    hi[...] = upper
    lo[...] = (x - upper.astype(_F32)).astype(_BF16)
    plgpu.commit_smem()


def _solutions(x, key_scale, value_scale, k, v, simulated):
    """W and U, from X [B,N,H,64,64]."""
    shape, columns, repeats = x.shape[:3], _columns(k, v), v.shape[2] // k.shape[2]

    def body(x_g, a_g, b_g, k_g, v_g, w_g, u_g, x_s, scale_s, hi_s, lo_s, right_s, out_s, arrived):
        at = tuple(jax.lax.axis_index(name) for name in _GRID)
        plgpu.copy_gmem_to_smem(x_g.at[at], x_s, arrived)
        plgpu.barrier_wait(arrived)
        for scale, right, out, shared in ((a_g, k_g, w_g, repeats), (b_g, v_g, u_g, 1)):
            plgpu.copy_gmem_to_smem(scale.at[at], scale_s, arrived)
            plgpu.barrier_wait(arrived)
            _split(floats(x_s) * along_columns(vector(scale_s, COLUMNS), (CHUNK, CHUNK)), hi_s, lo_s)
            for source, sink in _parts(shared, columns, right, out):
                plgpu.copy_gmem_to_smem(source, right_s, arrived)
                plgpu.barrier_wait(arrived)
                solved = product((hi_s, right_s), (lo_s, right_s))
                plgpu.wait_smem_to_gmem(0)
                out_s[...] = solved.astype(_BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, sink)
        plgpu.wait_smem_to_gmem(0)

    outputs = [jax.ShapeDtypeStruct((*v.shape[:3], width), _BF16) for width in (k.shape[3], v.shape[3])]
    scratch = [plgpu.SMEM((CHUNK, CHUNK), _F32), plgpu.SMEM((CHUNK,), _F32)]
    scratch += [tile(CHUNK, CHUNK)] * 2 + [tile(CHUNK, columns)] * 2 + [plgpu.Barrier(num_arrivals=1)]
    return tuple(
        _kernel("delta_rule_corrections", body, simulated, outputs, scratch, shape)(x, key_scale, value_scale, k, v)
    )


def _gradients(x, key_scale, value_scale, k, v, w, u, dw, du, simulated):
    """Gradients of the five arrays that `corrections` takes."""
    shape, columns, repeats = x.shape[:3], _columns(k, v), v.shape[2] // k.shape[2]

    def body(x_g, a_g, b_g, k_g, v_g, w_g, u_g, dw_g, du_g, dupper_g, da_g, db_g, dk_g, dv_g, *scratch):
        x_s, scale_s, hi_s, lo_s, right_s, solved_s, change_s, arrived, arrived3 = scratch
        at = tuple(jax.lax.axis_index(name) for name in _GRID)
        plgpu.copy_gmem_to_smem(x_g.at[at], x_s, arrived)
        plgpu.barrier_wait(arrived)
        _split(floats(x_s), hi_s, lo_s)
        sides = ((a_g, k_g, w_g, dw_g, dk_g, da_g, repeats), (b_g, v_g, u_g, du_g, dv_g, db_g, 1))

        def run(total):
            for scale, right, solved, change, dright, dscale, shared in sides:
                plgpu.copy_gmem_to_smem(scale.at[at], scale_s, arrived)
                plgpu.barrier_wait(arrived)
                factors = vector(scale_s, ROWS)
                sums = jnp.zeros((CHUNK,), _F32)
                for *sources, sink in _parts(shared, columns, right, solved, change, dright):
                    for source, target in zip(sources, (right_s, solved_s, change_s), strict=True):
                        plgpu.copy_gmem_to_smem(source, target, arrived3)
                    plgpu.barrier_wait(arrived3)
                    dsource = product(*((part.transpose((1, 0)), change_s) for part in (hi_s, lo_s)))
                    sums = sums + jnp.sum(dsource * floats(right_s), axis=1)
                    change_s[...] = dsource.astype(_BF16)
                    right_s[...] = (dsource * along_rows(factors, (CHUNK, columns))).astype(_BF16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(right_s, sink)
                    plgpu.wgmma(total, solved_s, change_s.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.wait_smem_to_gmem(0)
                scale_s[...] = sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(scale_s, dscale.at[at])
                plgpu.wait_smem_to_gmem(0)
            return total[...]

        total = pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), _F32))
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=WGMMA) for i in (0, 1))
        x_s[...] = jnp.where(row < column, -total, 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, dupper_g.at[at])
        plgpu.wait_smem_to_gmem(0)

    like = [(x.shape, _F32)] + [(key_scale.shape, _F32)] * 2 + [(w.shape, _BF16), (v.shape, _BF16)]
    scratch = [plgpu.SMEM((CHUNK, CHUNK), _F32), plgpu.SMEM((CHUNK,), _F32)]
    scratch += [tile(CHUNK, CHUNK)] * 2 + [tile(CHUNK, columns)] * 3
    scratch += [plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=3)]
    outputs = [jax.ShapeDtypeStruct(*one) for one in like]
    kernel = _kernel("delta_rule_corrections_back", body, simulated, outputs, scratch, shape)
    dupper, da, db, dk, dv = kernel(x, key_scale, value_scale, k, v, w, u, dw, du)
    dk = jnp.sum(dk.reshape(*k.shape[:3], repeats, k.shape[3]).astype(_F32), axis=3).astype(k.dtype)
    return dupper, da, db, dk, dv
