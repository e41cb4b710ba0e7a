"""The Hopper kernels of the short convolution: in the interpreter against the definition, and lowered for the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.short_convolution import mosaic_gpu, short_convolution
from kernels_pallas.target import Target, compiling_for, simulating

HOPPER = Target("gpu", "NVIDIA H200", hopper=True)


def inputs(batch, time, channels, taps, dtype):
    normal = np.random.default_rng(0).normal
    values = {
        "x": normal(size=(batch, time, channels)),
        "w": normal(size=(taps, channels)),
        "bias": normal(size=channels),
        "initial_state": normal(size=(batch, taps - 1, channels)),
    }
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


@pytest.fixture
def compared(simulated, monkeypatch):
    """``compared(values, segment_ids, length)`` → results of the kernels, with spans of `length` chunks of 8 tokens,
    and of the definition."""

    def run(values, segment_ids=None, length=8):
        monkeypatch.setattr(mosaic_gpu, "heuristic", lambda *inputs: {"chunk": 8, "length": length})
        return simulated(short_convolution, values, segment_ids=segment_ids)

    return run


def test_one_row_of_odd_sizes(compared, error, bound, without_races):
    got, wanted = compared(inputs(1, 20, 100, 4, jnp.float32))
    assert got.keys() == wanted.keys()
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


def test_packed_rows_in_spans_in_bfloat16(compared, error, bound, packed, without_races):
    got, wanted = compared(inputs(2, 37, 256, 4, jnp.bfloat16), packed(2, 37), length=2)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.bfloat16) for name in wanted)


@pytest.mark.slow
def test_packed_rows_in_spans_twice(compared, error, bound, packed, without_races):
    values = inputs(2, 37, 32, 4, jnp.float32)
    (got, wanted), (again, _) = (compared(values, packed(2, 37), length=1) for _ in range(2))
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)
    assert all(np.array_equal(got[name], again[name]) for name in got)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("time", "taps", "length"), [(26, 1, 8), (26, 2, 1), (63, 3, 2), (64, 4, 1), (27, 9, 2)])
def test_lengths_and_taps(compared, error, bound, packed, without_races, time, taps, length, ids):
    values = inputs(2, time, 60, taps, jnp.float32)
    got, wanted = compared(values, packed(2, time) if ids else None, length)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 3])
def test_rows_shorter_than_the_taps(compared, error, bound, without_races, time):
    values = inputs(1, time, 60, 4, jnp.float32)
    del values["bias"]
    got, wanted = compared(values)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


def loss(x, w, bias, ids=None):
    y, state = short_convolution(x, w, bias, segment_ids=ids, implementation="pallas")
    return y.astype(jnp.float32).sum() + state.sum()


def shapes(batch, time, channels, dtype):
    kinds = ((batch, time, channels), dtype), ((4, channels), "float32"), ((channels,), "float32")
    return [jax.ShapeDtypeStruct(*kind) for kind in kinds]


@pytest.mark.parametrize("channels", [1536, 1664])
def test_lowers_for_hopper(lowered_for_hopper, channels):
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    program = lowered_for_hopper(
        jax.value_and_grad(loss, argnums=(0, 1, 2)), *shapes(1, 2048, channels, "bfloat16"), ids
    )
    assert program.count("custom_call @mosaic_gpu") == 2


def test_the_gradient_is_our_kernel():
    with compiling_for(HOPPER):
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes(8, 2048, 4096, "bfloat16")))
    assert "short_convolution_backward" in program


def test_says_what_it_cannot_take():
    with simulating("gpu"), pytest.raises(ValueError, match="17 taps .at most 16.; can: xla, reference"):
        short_convolution(**inputs(1, 4, 8, 17, jnp.float32), implementation="pallas")
