"""The Hopper kernels of the selective scan: in the interpreter against the definition, and lowered for the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import mosaic_gpu, selective_scan
from kernels_pallas.target import Target, compiling_for, simulating

HOPPER = Target("gpu", "NVIDIA H200", hopper=True)

# The least and the largest step as powers of ten; the last is no decay at all.
STEPS = {"mixed": (-3, 0.5), "violent": (1.3, 1.3), "tiny": (-12, -12), "none": None}


def inputs(batch, time, channels, states, dtype, steps="mixed"):
    generator = np.random.default_rng(0)
    normal, shape = generator.normal, (batch, time, channels)
    dt = np.zeros(shape) if STEPS[steps] is None else 10 ** generator.uniform(*STEPS[steps], size=shape)
    values = {
        "u": normal(size=shape),
        "dt": dt,
        "A": -generator.uniform(0.5, 1, size=(channels, states)),
        "B": normal(size=(batch, time, states)),
        "C": normal(size=(batch, time, states)),
        "D": normal(size=channels),
        "initial_state": normal(size=(batch, channels, states)),
    }
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


@pytest.fixture
def compared(in_spans):
    return in_spans(selective_scan, mosaic_gpu)


def test_one_row_of_odd_sizes(compared, error, bound, without_races):
    got, wanted = compared(inputs(1, 20, 100, 16, jnp.float32))
    assert got.keys() == wanted.keys()
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


def test_packed_rows_in_spans_in_bfloat16(compared, error, bound, packed, without_races):
    values = inputs(2, 37, 128, 5, jnp.bfloat16)
    got, wanted = compared(values, packed(2, 37), spans=2)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.bfloat16, ("dt", "A")) for name in wanted)


@pytest.mark.slow
def test_the_same_bits_twice(compared, without_races):
    values = inputs(1, 18, 20, 64, jnp.float32)
    first, second = (compared(values, spans=2)[0] for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("ids", [False, True])
def test_extreme_steps(compared, error, bound, packed, without_races, steps, ids):
    values = inputs(1, 40, 128, 16, jnp.float32, steps)
    got, wanted = compared(values, packed(1, 40) if ids else None, spans=2)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "states", "chunk", "spans"),
    [(1, 16, 8, 1), (15, 4, 8, 1), (63, 16, 16, 4), (64, 16, 32, 2), (65, 32, 16, 3), (75, 64, 24, 1), (75, 8, 9, 5)],
)
def test_lengths_states_and_chunks(compared, error, bound, without_races, time, states, chunk, spans):
    got, wanted = compared(inputs(2, time, 60, states, jnp.float32), spans=spans, chunk=chunk)
    assert all(error(got[name], wanted[name]) < bound(name, jnp.float32) for name in wanted)


@pytest.mark.slow
def test_dtypes_may_differ_and_the_skip_be_missing(compared, error, bound, packed, without_races):
    values = inputs(1, 24, 64, 16, jnp.bfloat16)
    del values["D"]
    values |= {name: values[name].astype(jnp.float32) for name in ("dt", "A", "initial_state")}
    got, wanted = compared(values, packed(1, 27)[:, :24])
    assert all(error(got[name], wanted[name]) < bound(name, jnp.bfloat16, ("dt", "A")) for name in wanted)


def test_padding_is_inert_and_silent(packed, without_races):
    values, ids = inputs(1, 28, 32, 64, jnp.float32), packed(1, 28)
    poisoned = {
        name: jnp.where((ids == 0)[..., None], jnp.nan, value) if value.shape[:2] == ids.shape else value
        for name, value in values.items()
    }
    with simulating("gpu"):
        run = functools.partial(selective_scan, segment_ids=ids, implementation="pallas")
        (y, state), (clean, clean_state) = run(**poisoned), run(**values)
    assert np.array_equal(y, clean) and np.array_equal(state, clean_state)
    assert np.all(np.asarray(y)[ids == 0] == 0)


def loss(*values, **options):
    y, state = selective_scan(*values, implementation="pallas", **options)
    return y.astype(jnp.float32).sum() + state.sum()


def shapes(batch, time, channels, states, dtype):
    rows, projections = (batch, time, channels), (batch, time, states)
    kinds = (rows, dtype), (rows, dtype), ((channels, states), "float32"), (projections, dtype), (projections, dtype)
    return [jax.ShapeDtypeStruct(*kind) for kind in kinds]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("states", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_lowers_for_hopper(lowered_for_hopper, states, dtype):
    def gradient(*values):
        *values, ids = values
        return jax.grad(functools.partial(loss, segment_ids=ids), argnums=(0, 1, 2, 3, 4))(*values)

    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    program = lowered_for_hopper(gradient, *shapes(1, 2048, 1536, states, dtype), ids)
    assert program.count("custom_call @mosaic_gpu") == 4


def test_the_gradient_is_our_kernel():
    with compiling_for(HOPPER):
        program = str(jax.make_jaxpr(jax.grad(loss))(*shapes(8, 2048, 4096, 16, "bfloat16")))
    assert "selective_scan_backward" in program
    assert "selective_scan_ends" not in program


def test_only_inputs_and_the_states_of_chunks_are_kept():
    def pullback(*values):
        return jax.vjp(lambda *v: selective_scan(*v, implementation="pallas"), *values)[1]

    given = shapes(1, 2048, 256, 16, "bfloat16")
    with compiling_for(HOPPER):
        kept = jax.tree.leaves(jax.eval_shape(pullback, *given))
    states = 2048 // 16 * 256 * 16
    assert sum(x.size for x in kept) == sum(x.size for x in given) + states + 256 * 16


def test_says_what_it_cannot_take():
    values = inputs(1, 4, 8, 65, jnp.float32)
    with simulating("gpu"), pytest.raises(ValueError, match="65 states per channel .at most 64.; can: xla, reference"):
        selective_scan(**values, implementation="pallas")
    with simulating("gpu"), pytest.raises(ValueError, match="u of dtype float16"):
        selective_scan(**inputs(1, 4, 8, 4, jnp.float16), implementation="pallas")
