"""The TPU kernels of the recurrent operators, in the interpreters, against the token recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import fold_tpu
from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.short_convolution import short_convolution
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
DECAY_LIKE = ("dt", "A", "log_decay", "log_a", "beta")


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


def head_inputs(random, time, decay, kind, heads=4, groups=2, keys=20, values=40, delta=False):
    """Of linear attention and the delta rule; kind of log-decay: none, per head or per channel."""
    shape = {"none": None, "head": (BATCH, time, heads), "channel": (BATCH, time, heads, keys)}[kind]
    k = random.normal(size=(BATCH, time, groups, keys))
    given = {
        "q": random.normal(size=k.shape),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True) if delta else k,
        "v": random.normal(size=(BATCH, time, heads, values)),
        "initial_state": random.normal(size=(BATCH, heads, keys, values)),
    }
    if delta:
        given["beta"] = 2 / (1 + np.exp(-random.normal(size=(BATCH, time, heads))))
    return given if shape is None else given | {"log_decay": DECAYS[decay](random, shape)}


def convolution_inputs(random, time, decay, taps, channels=200):
    return {
        "x": random.normal(size=(BATCH, time, channels)),
        "w": random.normal(size=(taps, channels)),
        "bias": random.normal(size=channels),
        "initial_state": random.normal(size=(BATCH, taps - 1, channels)),
    }


def heads(**options):
    return functools.partial(head_inputs, **options)


CASES = {
    "selective_scan": (selective_scan, scan_inputs),
    "linear_recurrence": (linear_recurrence, recurrence_inputs),
    "linear_attention": (linear_attention, heads(kind="none", groups=4)),
    "linear_attention, per head, keys shared": (linear_attention, heads(kind="head", groups=1)),
    "linear_attention, per head": (linear_attention, heads(kind="head", heads=3, groups=3, values=130)),
    "linear_attention, per channel": (linear_attention, heads(kind="channel")),
    "delta_rule": (delta_rule, heads(kind="none", delta=True)),
    "delta_rule, per head": (delta_rule, heads(kind="head", delta=True)),
    "delta_rule, per channel": (delta_rule, heads(kind="channel", groups=4, delta=True)),
    "short_convolution": (short_convolution, functools.partial(convolution_inputs, taps=4)),
    "short_convolution, 11 taps": (short_convolution, functools.partial(convolution_inputs, taps=11)),
}
every_case = pytest.mark.parametrize("case", CASES)


def quick(*names):
    """Every case, slow but for these."""
    return pytest.mark.parametrize(
        "case", [pytest.param(x, marks=[] if x in names else pytest.mark.slow) for x in CASES]
    )


def inputs(case, dtype, time=TIME, decay="mixed"):
    values = CASES[case][1](np.random.default_rng(0), time, decay)
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


def call(case, implementation, segments=None, chunk_size=CHUNK):
    ids = None if segments is None else jnp.asarray(segments)
    return functools.partial(CASES[case][0], segment_ids=ids, chunk_size=chunk_size, implementation=implementation)


def wanted(results, case, values, segments=None):
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    return results(call(case, "reference", segments), values)


@pytest.fixture
def assert_close(error, bound):
    def check(got, reference, dtype):
        for name in reference:
            assert error(got[name], reference[name]) < bound(name, dtype, DECAY_LIKE), name

    return check


@quick(
    *(name for name in CASES if name not in ("linear_attention, per head", "delta_rule", "short_convolution, 11 taps"))
)
def test_packed_rows_are_the_tokens(results, assert_close, case):
    values = inputs(case, jnp.float32)
    with simulating("tpu"):
        got = results(call(case, "pallas", SEGMENTS), values)
    assert_close(got, wanted(results, case, values, SEGMENTS), jnp.float32)


@quick("linear_attention, per head, keys shared")
def test_bfloat16_in_rows_that_are_not_packed(results, assert_close, case):
    values = inputs(case, jnp.bfloat16)
    with simulating("tpu"):
        got = results(call(case, "pallas"), values)
    assert_close(got, wanted(results, case, values), jnp.bfloat16)


@quick("linear_recurrence", "delta_rule, per head")
def test_extreme_decays(results, assert_close, case):
    values = inputs(case, jnp.float32, time=33, decay="extreme")
    with simulating("tpu"):
        got = results(call(case, "pallas"), values)
    assert_close(got, wanted(results, case, values), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, -1e-3])
def test_nearly_parallel_keys_and_strong_corrections(results, assert_close, decay):
    """The inverse of a chunk's system is as hard as it gets; a product form of it is off by many orders."""
    random, case = np.random.default_rng(3), "delta_rule, per head"
    values = inputs(case, jnp.float32, time=64)
    keys = random.normal(size=(BATCH, 1, 2, 20)) + 0.3 * random.normal(size=(BATCH, 64, 2, 20))
    values["k"] = jnp.asarray(keys / np.linalg.norm(keys, axis=-1, keepdims=True), jnp.float32)
    values["beta"] = jnp.full_like(values["beta"], 2.0)
    values["log_decay"] = jnp.full_like(values["log_decay"], decay)
    with simulating("tpu"):
        got = results(call(case, "pallas", chunk_size=64), values)
    assert_close(got, wanted(results, case, values), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 15, 64, 257])
@pytest.mark.parametrize("chunk_size", [16, 64, None])
@every_case
def test_any_length_in_any_chunks(results, assert_close, case, time, chunk_size):
    values = inputs(case, jnp.float32, time=time)
    segments = np.ones((BATCH, time), np.int32)
    segments[0, time // 3 :], segments[1, time // 2 : time // 2 + 3] = 2, 0
    with simulating("tpu"):
        got = results(call(case, "pallas", segments, chunk_size), values)
    assert_close(got, wanted(results, case, values, segments), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@every_case
def test_in_simulated_memory_without_races_and_twice_the_same(results, assert_close, case, packed):
    """Memory that nothing has written holds NaN."""
    values, segments = inputs(case, jnp.float32), SEGMENTS if packed else None
    with simulating("tpu"), fold_tpu.interpreter(pltpu.InterpretParams(detect_races=True)):
        first, second = (results(call(case, "pallas", segments), values) for _ in range(2))
    assert_close(first, wanted(results, case, values, segments), jnp.float32)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@every_case
def test_the_gradient_runs_its_own_kernel(case):
    values = inputs(case, jnp.float32)

    def loss(values):
        y, state = call(case, "pallas")(**values)
        return jnp.sum(y) + jnp.sum(state)

    with compiling_for(Target("tpu", "TPU v5")):
        program = str(jax.make_jaxpr(jax.grad(loss))(values))
    operator = CASES[case][0].__name__
    assert program.count(f"name={operator}_forward") == program.count(f"name={operator}_backward") == 1


FULL_TILES = {
    selective_scan: functools.partial(scan_inputs, channels=256, states=16),
    linear_recurrence: functools.partial(recurrence_inputs, channels=256),
    linear_attention: heads(kind="channel", heads=2, groups=2, keys=128, values=128),
    delta_rule: heads(kind="channel", heads=2, groups=2, keys=128, values=128, delta=True),
}


@pytest.mark.parametrize("operator", FULL_TILES, ids=lambda operator: operator.__name__)
def test_inputs_and_chunk_states_are_kept_and_little_else(operator):
    time, chunk = 512, 64
    given = FULL_TILES[operator](np.random.default_rng(0), time, "mixed")
    arrays = {name: jax.ShapeDtypeStruct(value.shape, jnp.float32) for name, value in given.items()}

    def pullback(values):
        return jax.vjp(lambda v: operator(**v, chunk_size=chunk, implementation="pallas"), values)[1]

    with simulating("tpu"):
        kept = jax.tree.leaves(jax.eval_shape(pullback, arrays))
    states = given.pop("initial_state").size * time // chunk
    assert sum(x.size for x in kept) < 1.02 * (states + sum(x.size for x in given.values()))


@every_case
def test_float64_is_refused(case):
    with jax.enable_x64(True), simulating("tpu"), pytest.raises(ValueError, match="cannot honour .* of dtype float64"):
        call(case, "pallas")(**inputs(case, jnp.float64))
