"""Hydra against the matrix that it multiplies by, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.inference.decoding import Decoder
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.hydra import HydraSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 16, 21


def silu(x):
    return x / (1 + np.exp(-x))


def convolved(x, taps):
    middle, time = len(taps) // 2, len(x)
    y = np.zeros_like(x)
    for t in range(time):
        for j in range(-middle, middle + 1):
            if 0 <= t + j < time:
                y[t] += taps[middle + j] * x[t + j]
    return y


def quasiseparable(head, out, into, delta, decay, diagonal):
    """float64 ``[time, time]``: M[i, j] = C_i · B_j Δ_j times the decays between, strictly below and above; d on it."""
    time = len(diagonal)
    matrix = np.diag(diagonal)
    for i in range(time):
        for j in range(time):
            # The token shifted to is one nearer, so what reaches i from j is what left the state just before i.
            if j < i:
                between = np.exp(decay[j + 1 : i, 0, head].sum())
                matrix[i, j] = out[i - 1, 0] @ into[j, 0] * delta[j, 0, head] * between
            elif j > i:
                between = np.exp(decay[i + 1 : j, 1, head].sum())
                matrix[i, j] = out[i + 1, 1] @ into[j, 1] * delta[j, 1, head] * between
    return matrix


def by_the_equations(x, p):
    pair = np.einsum("te,e...->t...", x, p["value_gate"]["weight"])
    states = np.einsum("te,e...->t...", x, p["input_output"]["weight"])
    value, gate = silu(convolved(pair[:, 0], p["value_taps"])), pair[:, 1]
    states = silu(convolved(states, p["state_taps"]))
    delta = np.logaddexp(0, np.einsum("te,e...->t...", x, p["delta"]["weight"]) + p["delta_bias"])
    decay = -np.exp(p["decay"]) * delta
    diagonal = p["diagonal"] + np.einsum("thd,hdk->tk", value, p["diagonal_map"])
    y = np.zeros_like(value)
    for head in range(value.shape[1]):
        matrix = quasiseparable(head, states[:, :, 1], states[:, :, 0], delta, decay, diagonal[:, head])
        y[:, head] = matrix @ value[:, head]
    y = y * silu(gate)
    y = y / np.sqrt(np.mean(y**2, axis=(1, 2), keepdims=True) + 1e-5) * p["norm"]["scale"]
    return np.einsum("thd,hde->te", y, p["output"]["weight"])


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_is_its_quasiseparable_matrix(implementation, drawn):
    spec = HydraSpec(head_size=8, state_size=4, convolution=5, chunk_size=8, implementation=implementation)
    blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    start = drawn(blueprint)
    params = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape), start)
    x = jax.random.normal(jax.random.key(1), (1, TIME, WIDTH))
    got = np.asarray(jax.jit(lambda x: blueprint(params)(x, Context.rows(1, TIME))[0])(x))[0]
    want = by_the_equations(np.asarray(x[0], np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), params))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(np.triu(np.ones((TIME, TIME)), 1)).sum() > 0


def test_it_sees_both_directions(drawn):
    blueprint = Blueprint(lambda: HydraSpec(head_size=8, state_size=4).build(WIDTH, Initialization()))
    params = drawn(blueprint)
    x = jax.random.normal(jax.random.key(1), (1, TIME, WIDTH))

    @jax.jit
    def slopes(x):
        y, pulled = jax.vjp(lambda x: blueprint(params)(x, Context.rows(1, TIME))[0], x)
        return [pulled(jnp.zeros_like(y).at[place].set(1.0))[0] for place in ((0, slice(None), 0), (0, 10))]

    first_channel, one = slopes(x)
    assert np.all(np.abs(first_channel).max(-1) > 0)
    assert np.all(np.abs(one).max(-1) > 0), "the token in the middle depends on every other"


def test_it_does_not_generate_and_says_why():
    block = {"mixer": {"kind": "hydra", "head_size": 8}}
    spec = {"width": WIDTH, "vocab_size": 32, "blocks": {"both": block}, "layout": ["both"]}
    model = ModelSpec.model_validate(spec).build()
    with pytest.raises(ConfigError, match=r"model.blocks.both.mixer: 'hydra' is bidirectional"):
        Decoder(model, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head_size": 5}, "head_size: 5 does not divide the 32 inner values"), ({"convolution": 4}, "convolution: 4")],
)
def test_what_does_not_fit_is_named(options, message):
    block = {"mixer": {"kind": "hydra", "head_size": 8, **options}}
    with pytest.raises(ConfigError, match=message):
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 32, "blocks": {"b": block}, "layout": ["b"]})


def test_delta_starts_between_a_thousandth_and_a_tenth():
    blueprint = Blueprint(lambda: HydraSpec(head_size=8).build(64, Initialization()))
    delta = jax.nn.softplus(jax.jit(blueprint.init)(jax.random.key(0))["delta_bias"])
    assert jnp.all((delta > 0.99e-3) & (delta < 1.01e-1)) and delta.max() > 3 * delta.min()
