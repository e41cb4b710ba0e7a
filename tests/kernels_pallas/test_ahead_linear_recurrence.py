"""The Hopper kernels of the linear recurrence as the real assembler takes them: nothing spills, two blocks at once."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.linear_recurrence import linear_recurrence

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("batch", "time", "channels", "dtype", "packed"),
    [
        (8, 2048, 4096, "bfloat16", False),
        (1, 2048, 1024, "bfloat16", True),
        (4, 4096, 2560, "bfloat16", True),
        (1, 16384, 4096, "float32", True),
    ],
)
def test_fits_a_hopper_gpu(batch, time, channels, dtype, packed):
    def loss(log_a, x, ids=None):
        h, state = linear_recurrence(log_a, x, segment_ids=ids, implementation="pallas")
        return h.astype(jnp.float32).sum() + state.sum()

    rows = jax.ShapeDtypeStruct((batch, time, channels), dtype)
    arrays = [jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows]
    arrays += [jax.ShapeDtypeStruct((batch, time), jnp.int32)] * packed
    compiled = compile_ahead(jax.grad(loss, argnums=(0, 1)), arrays, "h200")
    split = batch * channels < 132 * 128
    names = ["backward", "forward"] + ["ends"] * 2 * split
    assert sorted(kernel.name.split("_")[2] for kernel in compiled.kernels) == sorted(names)
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    assert all(kernel.blocks_per_multiprocessor >= (2 if dtype == "bfloat16" else 1) for kernel in compiled.kernels)
