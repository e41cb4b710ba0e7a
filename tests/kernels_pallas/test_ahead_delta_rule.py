"""The delta rule compiled for an H200 that is not there: no register spills, no tensor core instruction waits."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.delta_rule import delta_rule

pytestmark = pytest.mark.slow

# batch, time, heads, groups, keys, values, decay: gated DeltaNet, few wide heads, DeltaNet, Kimi delta attention.
SHAPES = {
    "gated": (8, 2048, 16, 16, 128, 128, "head"),
    "gated_few_heads": (8, 2048, 4, 2, 128, 256, "head"),
    "plain": (4, 2048, 8, 8, 64, 64, "none"),
    "kimi": (8, 2048, 16, 16, 128, 128, "channel"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_compiles_without_spills(name):
    batch, time, heads, groups, keys, values, decay = SHAPES[name]
    arrays = [(batch, time, groups, keys)] * 2 + [(batch, time, heads, values)]
    gates = [(batch, time, heads)] + {"head": [(batch, time, heads)], "channel": [(batch, time, heads, keys)]}.get(
        decay, []
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arrays]
    inputs += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in gates]

    def loss(*inputs):
        y, state = delta_rule(*inputs, implementation="pallas")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state)

    kernels = compile_ahead(jax.grad(loss, argnums=tuple(range(len(inputs)))), inputs, "h200").kernels
    assert len({kernel.name for kernel in kernels}) >= 8
    assert all(kernel.spilled_bytes == 0 and not kernel.serialized for kernel in kernels), kernels
