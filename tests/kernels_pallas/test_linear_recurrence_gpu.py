"""The Hopper kernels of the linear recurrence: in the interpreter against the definition, and lowered for the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_recurrence import linear_recurrence, mosaic_gpu
from kernels_pallas.target import Target, compiling_for, simulating

HOPPER = Target("gpu", "NVIDIA H200", hopper=True)


def mixed(generator, shape):
    return -(10 ** generator.uniform(-3, 1.3, size=shape))


DECAYS = {
    "mixed": mixed,
    "extreme": lambda generator, shape: -generator.choice([0, 1e-12, 1e-3, 20, 88, 1e4, np.inf], size=shape),
    "none": lambda generator, shape: np.zeros(shape),
}


def inputs(batch, time, channels, dtype, decays="mixed"):
    generator = np.random.default_rng(0)
    shape = batch, time, channels
    values = {
        "log_a": DECAYS[decays](generator, shape),
        "x": generator.normal(size=shape),
        "initial_state": generator.normal(size=(batch, channels)),
    }
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


@pytest.fixture
def compared(in_spans):
    return in_spans(linear_recurrence, mosaic_gpu)


def test_one_row_of_odd_sizes(compared, error, bound, without_races):
    got, wanted = compared(inputs(1, 20, 100, jnp.float32))
    assert got.keys() == wanted.keys()
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


def test_packed_rows_in_spans_in_bfloat16(compared, error, bound, packed, without_races):
    got, wanted = compared(inputs(2, 37, 128, jnp.bfloat16), packed(2, 37), spans=2)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.bfloat16, ("log_a",)) for name in wanted)


@pytest.mark.slow
def test_extreme_decays_and_the_same_bits_twice(compared, error, bound, packed, without_races):
    values = inputs(1, 40, 130, jnp.float32, "extreme")
    (got, wanted), (again, _) = (compared(values, packed(1, 40), spans=3) for _ in range(2))
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)
    assert all(np.array_equal(got[name], again[name]) for name in got)


@pytest.mark.slow
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize(("time", "chunk", "spans"), [(1, 8, 1), (15, 8, 1), (63, 16, 4), (65, 40, 2), (75, 100, 1)])
def test_lengths_and_chunks(compared, error, bound, without_races, time, chunk, spans, decays):
    got, wanted = compared(inputs(2, time, 60, jnp.float32, decays), spans=spans, chunk=chunk)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


def test_padding_is_inert_and_silent(packed, without_races):
    values, ids = inputs(1, 28, 32, jnp.float32), packed(1, 28)
    poisoned = {
        name: jnp.where((ids == 0)[..., None], jnp.nan, value) if value.shape[:2] == ids.shape else value
        for name, value in values.items()
    }
    with simulating("gpu"):
        run = functools.partial(linear_recurrence, segment_ids=ids, implementation="pallas")
        (h, state), (clean, clean_state) = run(**poisoned), run(**values)
    assert np.array_equal(h, clean) and np.array_equal(state, clean_state)
    assert np.all(np.asarray(h)[ids == 0] == 0)


def loss(log_a, x, ids=None):
    h, state = linear_recurrence(log_a, x, segment_ids=ids, implementation="pallas")
    return h.astype(jnp.float32).sum() + state.sum()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_lowers_for_hopper(lowered_for_hopper, dtype):
    rows = jax.ShapeDtypeStruct((1, 2048, 2560), dtype)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    assert lowered_for_hopper(jax.grad(loss, argnums=(0, 1)), rows, rows, ids).count("custom_call @mosaic_gpu") == 4


def test_the_gradient_is_our_kernel():
    rows = jax.ShapeDtypeStruct((8, 2048, 4096), "bfloat16")
    with compiling_for(HOPPER):
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(rows, rows))
    assert "linear_recurrence_backward" in program
    assert "linear_recurrence_ends" not in program


def test_only_inputs_and_the_states_of_chunks_are_kept():
    rows = jax.ShapeDtypeStruct((1, 2048, 256), "bfloat16")
    with compiling_for(HOPPER):
        pullback = jax.eval_shape(lambda *v: jax.vjp(loss, *v)[1], rows, rows)
    kept = sum(x.size for x in jax.tree.leaves(pullback) if x.size > 1)
    assert kept == 2 * rows.size + 2048 // 32 * 256 + 256


def test_says_what_it_cannot_take():
    with simulating("gpu"), pytest.raises(ValueError, match="log_a of dtype float16, x of dtype float16; can: xla"):
        linear_recurrence(**inputs(1, 4, 8, jnp.float16), implementation="pallas")
