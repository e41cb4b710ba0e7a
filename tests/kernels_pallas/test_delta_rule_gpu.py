"""The delta rule's kernels for Hopper GPUs, interpreted: against the definition in float64, documents, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import target
from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.delta_rule.mosaic_gpu_corrections import corrections
from kernels_pallas.delta_rule.mosaic_gpu_inverse import inverse

BOUNDS = {"0": 5e-3, "1": 5e-3, "dbeta": 2e-2, "dlog_decay": 2e-2}  # of bfloat16 inputs; the other gradients 8e-3

# Documents of one token, one over the border of chunks, padding in front, inside, between and at the end.
SEGMENTS = np.array([[0] * 3 + [3] * 20 + [0] * 2 + [3] * 12 + [1] + [2] * 40 + [0] * 2 + [7] * 20])


def draw(seed=0, time=100, heads=2, groups=1, keys=64, values=64, batch=1):
    """Inputs of one row as float32 arrays that bfloat16 holds, keys of length about 1, and an initial state."""
    random = np.random.default_rng(seed)
    normal = random.normal
    k = normal(size=(batch, time, groups, keys))
    drawn = {
        "q": normal(size=(batch, time, groups, keys)) / np.sqrt(keys),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(size=(batch, time, heads, values)),
    }
    drawn = {name: jnp.asarray(value, jnp.bfloat16) for name, value in drawn.items()}
    drawn["beta"] = jnp.asarray(2 / (1 + np.exp(-normal(size=(batch, time, heads)))), jnp.float32)
    drawn["initial_state"] = jnp.asarray(normal(size=(batch, heads, keys, values)), jnp.float32)
    return drawn, random


def log_decays(random, *shape):
    """From almost none to one that forgets all at once."""
    return jnp.asarray(-(10 ** random.uniform(-3, 1.3, size=shape)), jnp.float32)


def errors(results, error, values, **options):
    """Name → error of the kernels' outputs and gradients, against the definition in float64."""

    def op(implementation):
        return lambda **values: delta_rule(**values, **options, implementation=implementation)

    with target.simulating("gpu"):
        got = results(op("pallas"), values)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in values.items()}
        wanted = results(op("reference"), exact)
    return {name: error(got[name], wanted[name]) for name in wanted}


def within_bounds(found):
    return all(value <= BOUNDS.get(name, 8e-3) for name, value in found.items())


def test_packed_documents_with_a_decay_per_head(results, error, without_races):
    values, random = draw()
    values["log_decay"] = log_decays(random, 1, 100, 2) / 20
    found = errors(results, error, values, segment_ids=jnp.asarray(SEGMENTS, jnp.int32))
    assert within_bounds(found), found


@pytest.mark.slow
def test_a_decay_per_channel(results, error, without_races):
    values, random = draw(heads=1, time=70)
    values["log_decay"] = log_decays(random, 1, 70, 1, 64)
    found = errors(results, error, values)
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 64, 150])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_lengths_and_widths(results, error, without_races, time, decay):
    values, random = draw(time=time, heads=4, groups=2, keys=72, values=130)
    shapes = {"head": (1, time, 4), "channel": (1, time, 4, 72)}
    if decay in shapes:
        values["log_decay"] = log_decays(random, *shapes[decay])
    found = errors(results, error, values)
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 100, 2), (1, 100, 2, 64)], ids=["head", "channel"])
@pytest.mark.parametrize("regime", [0.0, -1e-12, -88.0, -1e9])
def test_the_same_decay_everywhere(results, error, without_races, regime, shape):
    values, _ = draw(groups=2)
    values["log_decay"] = jnp.full(shape, regime, jnp.float32)
    found = errors(results, error, values)
    assert within_bounds(found), found


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_packed_documents_in_several_rows(results, error, without_races, decay):
    values, random = draw(heads=2, groups=2, batch=2)
    values["log_decay"] = log_decays(random, *{"head": (2, 100, 2), "channel": (2, 100, 2, 64)}[decay]) / 20
    segments = np.concatenate([SEGMENTS, SEGMENTS[:, ::-1]])
    found = errors(results, error, values, segment_ids=jnp.asarray(segments, jnp.int32))
    assert within_bounds(found), found


@pytest.mark.slow
def test_the_same_bits_twice(results):
    values, random = draw(heads=1, time=70)
    values["log_decay"] = log_decays(random, 1, 70, 1)
    with target.simulating("gpu"):
        first, second = (results(lambda **x: delta_rule(**x, implementation="pallas"), values) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def parallel_systems(random, systems):
    """diag(beta) A of keys that are nearly parallel (cosines about 0.9), beta 2: float32, lower triangular."""
    keys = random.normal(size=(systems, 1, 32)) + 0.33 * random.normal(size=(systems, 64, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(2 * keys @ keys.swapaxes(1, 2), -1).astype(np.float32)


def test_inverses_of_systems_of_nearly_parallel_keys(error, without_races):
    system = parallel_systems(np.random.default_rng(0), 5)
    above = system.swapaxes(1, 2) + np.tril(np.full((64, 64), np.nan, np.float32))  # not to be read
    got = inverse(jnp.asarray(above), simulated=True)
    assert error(got, np.linalg.inv(np.eye(64) + system.astype(np.float64))) < 1e-6


@pytest.mark.slow
def test_corrections_of_nearly_parallel_keys(error, without_races):
    batch, count, heads, width = 1, 1, 2, 64
    random = np.random.default_rng(0)
    system = parallel_systems(random, heads).reshape(batch, count, heads, 64, 64)
    scales = 2 / (1 + np.exp(-random.normal(size=(2, batch, count, heads, 64)).astype(np.float32)))
    k = random.normal(size=(batch, 1, 1, width)) + 0.33 * random.normal(size=(batch, 64, 1, width))
    arrays = [system.swapaxes(3, 4), *scales, k / np.linalg.norm(k, axis=-1, keepdims=True)]
    arrays.append(random.normal(size=(batch, 64, heads, width)))
    arrays = [jnp.asarray(x, jnp.bfloat16 if i > 2 else jnp.float32) for i, x in enumerate(arrays)]
    changes = tuple(jnp.asarray(random.normal(size=(batch, 64, heads, width)), jnp.bfloat16) for _ in range(2))

    def solved(upper, a, b, k, v):
        def right(scale, value):
            return scale[..., None] * value.transpose(0, 2, 1, 3)[:, None]

        inverses = jnp.linalg.inv(np.eye(64) + jnp.triu(upper, 1).swapaxes(3, 4))
        return tuple((inverses @ right(*x))[:, 0].transpose(0, 2, 1, 3) for x in ((a, k), (b, v)))

    def both(function, arrays, changes):
        outputs, pull = jax.vjp(function, *arrays)
        return (*outputs, *pull(changes))

    got = both(lambda *arrays: corrections(*arrays, True), arrays, changes)
    with jax.enable_x64(True):
        exact = [tuple(jnp.asarray(np.asarray(x), jnp.float64) for x in part) for part in (arrays, changes)]
        wanted = both(solved, *exact)
    found = [error(*pair) for pair in zip(got, wanted, strict=True)]
    assert all(value < 3e-3 for value in found), found


def shapes(batch, time, heads, groups, keys, values, decay):
    given = [(batch, time, groups, keys)] * 2 + [(batch, time, heads, values)]
    decays = {"head": [(batch, time, heads)], "channel": [(batch, time, heads, keys)]}.get(decay, [])
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in given]
    return arrays + [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(batch, time, heads), *decays]]


@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_lowers_for_hopper_with_kernels_in_the_gradient(lowered_for_hopper, decay):
    inputs = shapes(2, 512, 8, 4 if decay == "head" else 8, 128, 128, decay)

    def loss(*inputs):
        y, state = delta_rule(*inputs, implementation="pallas")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state)

    gradient = jax.grad(loss, argnums=tuple(range(len(inputs))))
    assert lowered_for_hopper(gradient, *inputs).count("custom_call @mosaic_gpu") == (12 if decay == "head" else 14)
    with target.simulating("gpu"):
        program = str(jax.make_jaxpr(gradient)(*inputs))
    assert "delta_rule_inverse" in program
    assert "delta_rule_corrections_back" in program
    assert "chunk_states_advance_back" in program


def test_what_it_cannot_honour_is_refused_in_one_line():
    values, _ = draw()
    values["v"] = values["v"].astype(jnp.float32)
    with target.simulating("gpu"), pytest.raises(ValueError, match=r"pallas.*v of dtype float32.*can: xla, reference"):
        delta_rule(**values, implementation="pallas")
