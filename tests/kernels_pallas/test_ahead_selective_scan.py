"""The Hopper kernels of the selective scan as the real assembler takes them: nothing spills, two blocks run at once."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.selective_scan import selective_scan

pytestmark = pytest.mark.slow

# Rows, tokens, channels, states, dtype, packed: of the largest, of models with 130M, 790M and 1.4B parameters, others.
SHAPES = [
    (8, 2048, 4096, 16, "bfloat16", False),
    (1, 2048, 1536, 16, "bfloat16", True),
    (4, 4096, 3072, 16, "bfloat16", True),
    (1, 16384, 4096, 16, "float32", True),
    (8, 2048, 2048, 8, "bfloat16", True),
    (2, 2048, 2048, 32, "bfloat16", False),
    (2, 2048, 2048, 64, "bfloat16", True),
]


@pytest.mark.parametrize(("batch", "time", "channels", "states", "dtype", "packed"), SHAPES)
def test_fits_a_hopper_gpu(batch, time, channels, states, dtype, packed):
    def loss(u, dt, A, B, C, D, ids=None):
        y, state = selective_scan(u, dt, A, B, C, D, segment_ids=ids, implementation="pallas")
        return y.astype(jnp.float32).sum() + state.sum()

    rows, projections = (batch, time, channels), (batch, time, states)
    arrays = [(rows, dtype)] * 2 + [((channels, states), "float32")] + [(projections, dtype)] * 2
    arrays += [((channels,), "float32")] + [(rows[:2], "int32")] * packed
    arrays = [jax.ShapeDtypeStruct(*array) for array in arrays]
    compiled = compile_ahead(jax.grad(loss, argnums=(0, 1, 2, 3, 4, 5)), arrays, "h200")
    split = batch * channels < 132 * min(128, 2048 // states)
    names = ["backward", "forward"] + ["ends"] * 2 * split
    assert sorted(kernel.name.split("_")[2] for kernel in compiled.kernels) == sorted(names)
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    assert all(kernel.blocks_per_multiprocessor >= (2 if dtype == "bfloat16" else 1) for kernel in compiled.kernels)
