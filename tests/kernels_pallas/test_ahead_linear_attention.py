"""Linear attention compiled for an H200 that is not there: no register spills, no tensor core instruction waits."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead import compile_ahead
from kernels_pallas.chunk_states import chunk_states
from kernels_pallas.linear_attention import linear_attention

pytestmark = pytest.mark.slow

# batch, time, heads, groups, keys, values, decays: Mamba-2, RetNet, GLA, the linear transformer, one of wide states.
SHAPES = {
    "mamba2_130m": (8, 2048, 24, 1, 128, 64, "head"),
    "mamba2_1b": (8, 2048, 64, 1, 128, 64, "head"),
    "retention": (8, 2048, 8, 8, 128, 256, "head"),
    "gla_few_heads": (8, 2048, 4, 4, 128, 256, "channel"),
    "gla": (8, 2048, 16, 16, 128, 128, "channel"),
    "plain": (4, 2048, 16, 16, 64, 64, "none"),
    "mamba2_long": (1, 16384, 24, 1, 128, 64, "head"),
    "wide": (1, 16384, 4, 4, 256, 256, "head"),
}


def arrays(batch, time, heads, groups, keys, values, decay):
    shapes = [(batch, time, groups, keys)] * 2 + [(batch, time, heads, values)]
    decays = {"head": (batch, time, heads), "channel": (batch, time, heads, keys)}
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return given + ([jax.ShapeDtypeStruct(decays[decay], jnp.float32)] if decay in decays else [])


def compiled(function, inputs):
    def loss(*inputs):
        y, state = function(*inputs)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state)

    return compile_ahead(jax.grad(loss, argnums=tuple(range(len(inputs)))), inputs, "h200").kernels


def unspoilt(kernels):
    return all(kernel.spilled_bytes == 0 and not kernel.serialized for kernel in kernels)


@pytest.mark.parametrize("name", SHAPES)
def test_compiles_without_spills(name):
    kernels = compiled(lambda *inputs: linear_attention(*inputs, implementation="pallas"), arrays(*SHAPES[name]))
    assert len({kernel.name for kernel in kernels}) >= 4
    assert unspoilt(kernels), kernels


def test_corrected_states_compile_without_spills():
    batch, time, heads, keys, values = 8, 2048, 16, 128, 128
    narrow, wide, count = (batch, time, heads, keys), (batch, time, heads, values), time // 64
    shapes = [narrow, narrow, (batch, count, heads, 64, 64), wide]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (*shapes, narrow)]
    states = [(batch, count, heads, keys), (batch, heads, keys, values)]
    inputs[4:4] = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in states]
    kernels = compiled(chunk_states, inputs)
    assert len(kernels) >= 5
    assert unspoilt(kernels), kernels
