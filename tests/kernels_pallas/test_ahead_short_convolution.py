"""The Hopper kernels of the short convolution as the real assembler takes them: no spills, three blocks at once."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.short_convolution import short_convolution

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("batch", "time", "channels", "dtype", "packed"),
    [(8, 2048, 4096, "bfloat16", False), (1, 2048, 1664, "bfloat16", True), (4, 4096, 3328, "float32", True)],
)
def test_fits_a_hopper_gpu(batch, time, channels, dtype, packed):
    def loss(x, w, bias, ids=None):
        y, state = short_convolution(x, w, bias, segment_ids=ids, implementation="pallas")
        return y.astype(jnp.float32).sum() + state.sum()

    arrays = [jax.ShapeDtypeStruct((batch, time, channels), dtype)]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, channels), (channels,))]
    arrays += [jax.ShapeDtypeStruct((batch, time), jnp.int32)] * packed
    compiled = compile_ahead(jax.value_and_grad(loss, argnums=(0, 1, 2)), arrays, "h200")
    assert sorted(kernel.name.split("_")[2] for kernel in compiled.kernels) == ["backward", "forward"]
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    assert all(kernel.blocks_per_multiprocessor >= 3 for kernel in compiled.kernels)
