"""The TPU kernels of the recurrent operators, in the interpreters, against the token recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import fold_tpu
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.target import Target, compiling_for, simulating

BATCH, TIME, CHUNK = 2, 75, 32

# Documents of one token, over borders of chunks, padding in front, within a document, between two, at the end.
SEGMENTS = np.array(
    [
        [0] * 5 + [3] * 20 + [0] * 3 + [3] * 12 + [1] + [2] * 30 + [0] * 2 + [7] * 2,
        [4] * 62 + [0] * 3 + [2] * 3 + [5] + [0] * 6,
    ],
    np.int32,
)
DECAYS = {"mixed": lambda random, shape: -(10 ** random.uniform(-3, 1.3, size=shape))}
DECAYS["extreme"] = lambda random, shape: -random.choice([0, 1e-12, 1e-3, 1, 20, 88, 1e4], size=shape)
DECAY_LIKE = ("ddt", "dA", "dlog_decay", "dlog_a", "dbeta")


def scan_inputs(random, time, decay, channels=130, states=3):
    tokens = BATCH, time, channels
    return {
        "u": random.normal(size=tokens),
        "dt": -DECAYS[decay](random, tokens),
        "A": -random.uniform(0.5, 1, size=(channels, states)),
        "B": random.normal(size=(BATCH, time, states)),
        "C": random.normal(size=(BATCH, time, states)),
        "D": random.normal(size=channels),
        "initial_state": random.normal(size=(BATCH, channels, states)),
    }


def recurrence_inputs(random, time, decay, channels=260):
    tokens = BATCH, time, channels
    return {
        "log_a": DECAYS[decay](random, tokens),
        "x": random.normal(size=tokens),
        "initial_state": random.normal(size=(BATCH, channels)),
    }


CASES = {
    "selective_scan": (selective_scan, scan_inputs),
    "linear_recurrence": (linear_recurrence, recurrence_inputs),
}
every_case = pytest.mark.parametrize("case", CASES)


def inputs(case, dtype, time=TIME, decay="mixed"):
    values = CASES[case][1](np.random.default_rng(0), time, decay)
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


def call(case, implementation, segments=None, chunk_size=CHUNK):
    ids = None if segments is None else jnp.asarray(segments)
    return functools.partial(CASES[case][0], segment_ids=ids, chunk_size=chunk_size, implementation=implementation)


def wanted(results, case, values, segments=None):
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    return results(call(case, "reference", segments), values)


def assert_close(error, got, reference, dtype):
    """The bounds of values, of gradients, and of those of decay-like inputs."""
    values, gradients, decays = (1e-5, 1e-4, 1e-4) if dtype == jnp.float32 else (5e-3, 8e-3, 2e-2)
    for name in reference:
        bound = decays if name in DECAY_LIKE else gradients if name.startswith("d") else values
        assert error(got[name], reference[name]) < bound, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@every_case
def test_packed_rows_are_the_tokens(results, error, case, dtype):
    values = inputs(case, dtype)
    with simulating("tpu"):
        got = results(call(case, "pallas", SEGMENTS), values)
    assert_close(error, got, wanted(results, case, values, SEGMENTS), dtype)


@every_case
def test_extreme_decays_in_rows_that_are_not_packed(results, error, case):
    values = inputs(case, jnp.float32, time=33, decay="extreme")
    with simulating("tpu"):
        got = results(call(case, "pallas"), values)
    assert_close(error, got, wanted(results, case, values), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 15, 64, 257])
@pytest.mark.parametrize("chunk_size", [16, 64, None])
@every_case
def test_any_length_in_any_chunks(results, error, case, time, chunk_size):
    values = inputs(case, jnp.float32, time=time)
    segments = np.ones((BATCH, time), np.int32)
    segments[0, time // 3 :], segments[1, time // 2 : time // 2 + 3] = 2, 0
    with simulating("tpu"):
        got = results(call(case, "pallas", segments, chunk_size), values)
    assert_close(error, got, wanted(results, case, values, segments), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@every_case
def test_in_simulated_memory_without_races_and_twice_the_same(results, error, case, packed):
    """Memory that nothing has written holds NaN."""
    values, segments = inputs(case, jnp.float32), SEGMENTS if packed else None
    with simulating("tpu"), fold_tpu.interpreter(pltpu.InterpretParams(detect_races=True)):
        first, second = (results(call(case, "pallas", segments), values) for _ in range(2))
    assert_close(error, first, wanted(results, case, values, segments), jnp.float32)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@every_case
def test_the_gradient_runs_its_own_kernel(case):
    values = inputs(case, jnp.float32)

    def loss(values):
        y, state = call(case, "pallas")(**values)
        return jnp.sum(y) + jnp.sum(state)

    with compiling_for(Target("tpu", "TPU v5")):
        program = str(jax.make_jaxpr(jax.grad(loss))(values))
    operator = case.split(",")[0]
    assert program.count(f"name={operator}_forward") == program.count(f"name={operator}_backward") == 1


@every_case
def test_float64_is_refused(case):
    with jax.enable_x64(True), simulating("tpu"), pytest.raises(ValueError, match="cannot honour .* of dtype float64"):
        call(case, "pallas")(**inputs(case, jnp.float64))
