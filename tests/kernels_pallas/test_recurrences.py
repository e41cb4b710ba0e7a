"""Every recurrent operator: tokens against a loop in NumPy, chunks against tokens, documents, halves, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.short_convolution import short_convolution

BATCH, TIME, CHUNK = 2, 100, 32
CHANNELS, STATE, HEADS, GROUPS, KEYS, VALUES = 6, 3, 4, 2, 5, 3

# Documents of one token, documents over chunk borders, padding in front, within a document, between two, at the end.
SEGMENTS = np.array(
    [
        [0] * 5 + [3] * 20 + [0] * 3 + [3] * 12 + [1] + [2] * 30 + [0] * 2 + [7] * 27,
        [4] * 70 + [0] * 3 + [2] * 15 + [5] + [0] * 11,
    ],
    np.int32,
)
ONE_DOCUMENT = np.ones((BATCH, TIME), np.int32)

# The least log-decay of a step, as log10; the largest is 0 or close to it.
REGIMES = {"violent": (1.3, 1.3), "mixed": (-3, 1.3), "none": None}


def log_decays(generator, regime, *shape):
    bounds = REGIMES[regime]
    return np.zeros(shape) if bounds is None else -(10 ** generator.uniform(*bounds, size=shape))


def scan_inputs(generator, time, regime):
    normal = generator.normal
    return {
        "u": normal(size=(BATCH, time, CHANNELS)),
        "dt": -log_decays(generator, regime, BATCH, time, CHANNELS),
        "A": -generator.uniform(0.5, 1, size=(CHANNELS, STATE)),
        "B": normal(size=(BATCH, time, STATE)),
        "C": normal(size=(BATCH, time, STATE)),
        "D": normal(size=CHANNELS),
    }, (BATCH, CHANNELS, STATE)


def attention_inputs(generator, time, regime, decay, delta=False):
    normal = generator.normal
    shape = {"none": None, "head": (BATCH, time, HEADS), "channel": (BATCH, time, HEADS, KEYS)}[decay]
    keys = normal(size=(BATCH, time, GROUPS, KEYS))
    inputs = {
        "q": normal(size=(BATCH, time, GROUPS, KEYS)),
        "k": keys / np.linalg.norm(keys, axis=-1, keepdims=True) if delta else keys,
        "v": normal(size=(BATCH, time, HEADS, VALUES)),
    }
    if delta:
        inputs["beta"] = 2 / (1 + np.exp(-normal(size=(BATCH, time, HEADS))))
    if shape is not None:
        inputs["log_decay"] = log_decays(generator, regime, *shape)
    return inputs, (BATCH, HEADS, KEYS, VALUES)


def recurrence_inputs(generator, time, regime):
    shape = (BATCH, time, CHANNELS)
    return {"log_a": log_decays(generator, regime, *shape), "x": generator.normal(size=shape)}, (BATCH, CHANNELS)


def convolution_inputs(generator, time, regime, taps):
    return {
        "x": generator.normal(size=(BATCH, time, CHANNELS)),
        "w": generator.normal(size=(taps, CHANNELS)),
        "bias": generator.normal(size=CHANNELS),
    }, (BATCH, taps - 1, CHANNELS)


def loop(name, state, x):
    """Outputs [T, ...] and the last state of one document of one row, token by token; x holds its tokens alone."""
    outputs = []
    for t in range(len(x["x" if "x" in x else "u" if "u" in x else "v"])):
        if name == "selective_scan":
            state = np.exp(x["dt"][t][:, None] * x["A"]) * state + (x["dt"][t] * x["u"][t])[:, None] * x["B"][t]
            outputs.append(state @ x["C"][t] + x["D"] * x["u"][t])
        elif name == "linear_recurrence":
            state = np.exp(x["log_a"][t]) * state + x["x"][t]
            outputs.append(state)
        elif name == "short_convolution":
            seen = np.concatenate([state, x["x"][t][None]])
            state = seen[1:]
            outputs.append((x["w"] * seen).sum(0) + x["bias"])
        else:
            after = np.zeros_like(state)
            outputs.append(np.zeros((HEADS, VALUES)))
            for h in range(HEADS):
                q, k = (x[key][t, h // (HEADS // GROUPS)] for key in "qk")
                decay = np.exp(x["log_decay"][t, h]) if "log_decay" in x else 1.0
                decayed = np.broadcast_to(decay, KEYS)[:, None] * state[h]
                written = x["v"][t, h]
                if "beta" in x:
                    written = x["beta"][t, h] * (written - decayed.T @ k)
                after[h] = decayed + np.outer(k, written)
                outputs[-1][h] = after[h].T @ q
            state = after
    return np.array(outputs), state


def separate_documents(name, inputs, state, segments):
    """Every document of every row on its own, padding left out."""
    first = next(inputs[key] for key in ("u", "v", "x") if key in inputs)
    y, last = np.zeros_like(first), np.array(state)
    for row in range(BATCH):
        live = np.flatnonzero(segments[row])
        for number, name_of in enumerate(dict.fromkeys(segments[row, live])):
            tokens = live[segments[row, live] == name_of]
            own = {key: value if value.ndim < 3 else value[row, tokens] for key, value in inputs.items()}
            y[row, tokens], last[row] = loop(name, state[row] if number == 0 else np.zeros_like(state[row]), own)
    return y, last


OPERATORS = {
    "selective_scan": (selective_scan, scan_inputs),
    "linear_attention": (linear_attention, functools.partial(attention_inputs, decay="none")),
    "linear_attention, head": (linear_attention, functools.partial(attention_inputs, decay="head")),
    "linear_attention, channel": (linear_attention, functools.partial(attention_inputs, decay="channel")),
    "delta_rule": (delta_rule, functools.partial(attention_inputs, decay="none", delta=True)),
    "delta_rule, head": (delta_rule, functools.partial(attention_inputs, decay="head", delta=True)),
    "delta_rule, channel": (delta_rule, functools.partial(attention_inputs, decay="channel", delta=True)),
    "linear_recurrence": (linear_recurrence, recurrence_inputs),
    "short_convolution": (short_convolution, functools.partial(convolution_inputs, taps=4)),
}
every_operator = pytest.mark.parametrize("case", OPERATORS)


def inputs(case, regime="mixed", time=TIME, dtype=np.float64):
    """Named inputs and an initial state, float64 values that `dtype` can hold."""
    generator = np.random.default_rng(0)
    values, shape = OPERATORS[case][1](generator, time, regime)
    values["initial_state"] = generator.normal(size=shape)
    return {name: np.asarray(np.asarray(value, dtype), np.float64) for name, value in values.items()}


def cast(values, dtype):
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


@functools.cache
def program(case, implementation, time, chunk_size, packed, dtype):
    """Compiled: named inputs and segment ids -> y, state, and the gradients of a sum that weighs both."""
    generator = np.random.default_rng(1)

    def run(values, segments):
        weights = generator.normal(size=(BATCH * time * 64))

        def loss(values):
            ids = segments if packed else None
            options = {"chunk_size": chunk_size, "implementation": implementation, "segment_ids": ids}
            y, state = OPERATORS[case][0](**values, **options)
            sums = (jnp.vdot(x.astype(state.dtype), weights[: x.size].reshape(x.shape)) for x in (y, state))
            return sum(sums), (y, state)

        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(values)
        return *results, gradients

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def run(case, values, segments=ONE_DOCUMENT, *, implementation="xla", chunk_size=CHUNK, packed=True, dtype=np.float64):
    with jax.enable_x64(dtype == np.float64):
        time = segments.shape[1]
        compiled = program(case, implementation, time, chunk_size, packed, dtype)
        y, state, gradients = compiled(cast(values, dtype), jnp.asarray(segments))
        return {"y": y, "state": state} | {f"d{name}": value for name, value in gradients.items()}


@functools.cache
def wanted(case, regime, dtype=np.float64):
    """Of the token recurrence in float64, on inputs rounded to `dtype`."""
    values = inputs(case, regime, dtype=dtype)
    return run(case, values, implementation="reference", chunk_size=None)


def error(got, wanted):
    """Relative root mean square; NaN anywhere fails every comparison."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6) if got.size else 0.0


def assert_close(got, wanted, values, gradients, decays=None):
    """Bounds of the values, of the gradients, and of those of decay-like inputs."""
    for name in wanted:
        bound = values if name in ("y", "state") else gradients
        if decays is not None and name in ("ddt", "dA", "dlog_decay", "dlog_a", "dbeta"):
            bound = decays
        assert error(got[name], wanted[name]) < bound, name


@every_operator
def test_tokens_are_the_loop_over_separate_documents(case):
    values = inputs(case)
    got = run(case, values, SEGMENTS, implementation="reference", chunk_size=None)
    state = values.pop("initial_state")
    y, state = separate_documents(case.split(",")[0], values, state, SEGMENTS)
    assert error(got["y"], y) < 1e-12
    assert error(got["state"], state) < 1e-12


@every_operator
def test_chunks_are_the_tokens_in_packed_rows(case):
    values = inputs(case)
    got = run(case, values, SEGMENTS)
    assert_close(got, run(case, values, SEGMENTS, implementation="reference", chunk_size=None), 1e-11, 1e-10)


@pytest.mark.parametrize("regime", REGIMES)
@every_operator
def test_chunks_are_the_tokens(case, regime):
    assert_close(run(case, inputs(case, regime)), wanted(case, regime), 1e-11, 1e-10)


@pytest.mark.parametrize("regime", REGIMES)
@every_operator
def test_chunks_in_float32(case, regime):
    got = run(case, inputs(case, regime, dtype=np.float32), packed=False, dtype=np.float32)
    assert got["y"].dtype == got["state"].dtype == jnp.float32
    assert_close(got, wanted(case, regime, np.float32), 1e-5, 1e-4)


@every_operator
def test_chunks_in_bfloat16(case):
    got = run(case, inputs(case, dtype=jnp.bfloat16), packed=False, dtype=jnp.bfloat16)
    assert got["y"].dtype == jnp.bfloat16 and got["state"].dtype == jnp.float32
    assert_close(got, wanted(case, "mixed", jnp.bfloat16), 5e-3, 8e-3, 2e-2)


@every_operator
def test_padding_is_inert_whatever_it_holds(case):
    values = inputs(case)
    clean = run(case, values, SEGMENTS)
    padding = SEGMENTS == 0
    for value in values.values():
        if value.shape[:2] == padding.shape:
            value[padding] = np.nan
    assert_close(run(case, values, SEGMENTS), clean, 1e-15, 1e-15)
    assert np.all(np.asarray(clean["y"])[padding] == 0)
    assert all(np.all(np.asarray(clean[f"d{n}"])[padding] == 0) for n, x in values.items() if x.shape[:2] == (2, 100))


@every_operator
def test_the_future_changes_nothing(case):
    values, cut = inputs(case), 45
    before = np.asarray(run(case, values)["y"])
    for value in values.values():
        if value.shape[:2] == (BATCH, TIME):
            value[:, cut:] *= 0.7
    after = np.asarray(run(case, values)["y"])
    assert error(after[:, :cut], before[:, :cut]) < 1e-15
    assert error(after[:, cut:], before[:, cut:]) > 1e-3


@every_operator
def test_two_halves_with_the_state_between_are_the_whole(case):
    values, half = inputs(case), TIME // 2
    whole = run(case, values)

    def part(rows, state):
        own = {n: x[:, rows] if x.shape[:2] == (BATCH, TIME) else x for n, x in values.items()}
        return run(case, own | {"initial_state": state}, ONE_DOCUMENT[:, rows])

    first = part(slice(half), values["initial_state"])
    second = part(slice(half, None), np.asarray(first["state"]))
    assert error(np.concatenate([first["y"], second["y"]], axis=1), whole["y"]) < 1e-11
    assert error(second["state"], whole["state"]) < 1e-11


def extreme(case, generator, time):
    """Inputs of one row: huge, tiny and ordinary scales; decays from none at all to far beyond what exp can tell."""
    values, shape = OPERATORS[case][1](generator, time, "none")
    values["initial_state"] = generator.normal(size=shape)
    for name, value in values.items():
        if name in ("log_decay", "log_a", "dt", "A"):
            sign = 1 if name == "dt" else -1
            values[name] = sign * generator.choice([0, 1e-12, 1e-3, 1, 20, 88, 1e4], size=value.shape)
        elif name == "beta":
            values[name] = generator.choice([0, 1e-6, 1, 2], size=value.shape)
        elif name == "k" and "beta" in values:
            parallel = value[:, :1] + generator.choice([0, 1e-4, 0.3]) * value
            values[name] = parallel / np.linalg.norm(parallel, axis=-1, keepdims=True)
        else:
            values[name] = value * generator.choice([0, 1e-6, 1, 1e4])
    return values


@every_operator
def test_no_nan_for_a_thousand_extreme_inputs(case):
    generator, time = np.random.default_rng(2), 20
    many = [extreme(case, generator, time) for _ in range(1000 // BATCH)]
    stacked = {name: jnp.asarray(np.stack([one[name] for one in many]), jnp.float32) for name in many[0]}

    def loss(values):
        y, state = OPERATORS[case][0](**values, chunk_size=16, implementation="xla")
        return jnp.sum(y) + jnp.sum(state), (y, state)

    function = jax.vmap(jax.value_and_grad(loss, has_aux=True))
    results = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(stacked)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 15, 64, 100, 257])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 100, None])
@every_operator
def test_any_length_in_any_chunks(case, time, chunk_size):
    segments = np.ones((BATCH, time), np.int32)
    segments[0, time // 3 :], segments[1, time // 2 : time // 2 + 3] = 2, 0
    values = inputs(case, time=time)
    reference = run(case, values, segments, implementation="reference", chunk_size=None)
    assert_close(run(case, values, segments, chunk_size=chunk_size), reference, 1e-11, 1e-10)
