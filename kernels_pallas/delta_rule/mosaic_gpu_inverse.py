"""Inverses of the unit triangular systems of the delta rule on Hopper GPUs, by substitution in float32.

A column of the inverse is a lane, a system a warp, so that nothing is ever exchanged:

    lane c of warp n:  x_i = [i = c] - sum over j < i of upper[n, j, i] x_j,   i = 0 .. 63

Blocks of 16 x_i are held in registers. They first take in all earlier x_j, from shared memory, then each other. Columns
come in halves of 32, the second of which starts at row 32. Layouts are those of threads ("lane semantics"): the search
for layouts that the default would make does not end on so many slices.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.tiles import CHUNK
from kernels_pallas.hopper import interpreted

_SYSTEMS, _BLOCK, _LANES = 4, 16, 32  # per block of threads, one per warp; rows at a time; columns at a time
_STEPS = [(half, block) for half in range(2) for block in range(2 * half, CHUNK // _BLOCK)]

_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((_SYSTEMS, 1, _LANES), (1,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1
)  # of [systems, rows, columns]: rows are registers
_ROW, _COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(2)


def inverse(upper: jax.Array, *, simulated: bool = False) -> jax.Array:
    """X = (I + upperᵀ)⁻¹ of [..., 64, 64] in float32; `upper` is read strictly above its diagonal alone."""
    count = -(-upper[..., 0, 0].size // _SYSTEMS) * _SYSTEMS
    flat = upper.reshape(-1, CHUNK, CHUNK)
    flat = jnp.pad(flat, ((0, count - flat.shape[0]), (0, 0), (0, 0)))
    kernel = plgpu.kernel(
        _body,
        out_type=jax.ShapeDtypeStruct(flat.shape, jnp.float32),
        grid=(count // _SYSTEMS,),
        grid_names=("systems",),
        scratch_types=[
            plgpu.SMEM((2, _SYSTEMS, CHUNK, _BLOCK), jnp.float32),
            plgpu.SMEM((_SYSTEMS, CHUNK, _LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="delta_rule_inverse",
        interpret=interpreted(simulated),
    )
    return kernel(flat)[: upper[..., 0, 0].size].reshape(upper.shape)


def _body(upper, inverses, columns, solved, arrived):
    """columns [2,4,64,16]: what of `upper` the 16 rows of a step need, and the next; solved [4,64,32]: the half."""
    own = pl.ds(jax.lax.axis_index("systems") * _SYSTEMS, _SYSTEMS)

    def fetch(step):
        rows = pl.ds(_STEPS[step][1] * _BLOCK, _BLOCK)
        plgpu.copy_gmem_to_smem(upper.at[own, :, rows], columns.at[step % 2], arrived.at[step % 2])

    fetch(0)
    for step, (half, block) in enumerate(_STEPS):
        if half and block == 2:
            plgpu.wait_smem_to_gmem(0)
            solved[:, :_LANES] = plgpu.layout_cast(jnp.zeros((_SYSTEMS, _LANES, _LANES), jnp.float32), _LAYOUT)
        if step + 1 < len(_STEPS):
            plgpu.commit_smem()
            fetch(step + 1)
        plgpu.barrier_wait(arrived.at[step % 2])
        solved[:, pl.ds(block * _BLOCK, _BLOCK)] = _rows(columns.at[step % 2], solved, half, block)
        if (block + 1) * _BLOCK == CHUNK:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(solved, inverses.at[own, :, pl.ds(half * _LANES, _LANES)])
    plgpu.wait_smem_to_gmem(0)


def _rows(columns, solved, half, block):
    """Rows of a block [4,16,32], given all before it."""
    shape = (_SYSTEMS, _BLOCK, _LANES)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_LAYOUT) + block * _BLOCK
    column = plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=_LAYOUT) + half * _LANES

    def factors(j):
        return plgpu.load(columns.at[:, j], layout=_COLUMN, optimized=False)

    def earlier(j, rest):
        x = plgpu.load(solved.at[:, j], layout=_ROW, optimized=False)
        return rest - _spread(factors(j), shape, (0, 1)) * _spread(x, shape, (0, 2))

    rest = jnp.where(row == column, 1.0, 0.0).astype(jnp.float32)
    rest = jax.lax.fori_loop(half * _LANES, block * _BLOCK, earlier, rest)
    rows = []
    for r in range(_BLOCK):
        rows.append(rest[:, :1])
        if r + 1 < _BLOCK:
            x, rest = jnp.sum(rest[:, :1], axis=1), rest[:, 1:]  # of one row: squeezed
            theirs = factors(block * _BLOCK + r)[:, r + 1 :]
            rest = rest - _spread(theirs, rest.shape, (0, 1)) * _spread(x, rest.shape, (0, 2))
    return jnp.concatenate(rows, axis=1)


def _spread(value, shape, dimensions):
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(value, shape, dimensions), _LAYOUT)
