"""Mamba-2 against its equations, written out token by token, its start, its options, faults and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.mamba2 import Mamba2Spec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 24, 21
OPTIONS = {
    "plain": {"head_size": 12},
    "groups": {"heads": 6, "head_size": 4, "groups": 3, "bias": True, "output_bias": True, "activation": "relu"},
    "norm_first": {"heads": 4, "groups": 2, "norm": "norm_first", "dt_limit": [0.02, 0.5], "norm_epsilon": 1e-2},
    "falcon": {"heads": 4, "norm": None, "multipliers": [0.5, 2.0, 0.7, 1.5, 3.0], "convolution_bias": False},
}
ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}


def blueprint_of(**options):
    spec = Mamba2Spec.model_validate({"state_size": 5, **options})
    assert not list(spec.faults(WIDTH))
    return spec, Blueprint(lambda: spec.build(WIDTH, Initialization()))


def mapped(x, p):
    return np.tensordot(x, p["weight"], 1) + p.get("bias", 0)


def normed(y, p, spec):
    """`y [heads, size]`, each group's values together."""
    grouped = y.reshape(spec.groups, -1)
    grouped = grouped / np.sqrt(np.mean(grouped**2, -1, keepdims=True) + spec.norm_epsilon)
    return (grouped * p["norm"]["scale"].reshape(grouped.shape)).reshape(y.shape)


def by_the_equations(x, p, spec):
    """`x [time, width]` → the same in float64, one token at a time."""
    factors, taps, silu = spec.multipliers or [1.0] * 5, spec.convolution, ACTIVATIONS["silu"]
    pair, states, dts = (mapped(x, p[name]) for name in ("gate_input", "input_output", "dt"))
    heads, size = pair.shape[-2:]
    inputs = {
        "convolution": factors[1] * pair[:, 1],
        "input_output_convolution": np.stack([factors[2] * states[:, 0], factors[3] * states[:, 1]], 1),
    }
    inputs = {name: np.concatenate([np.zeros((taps - 1, *v.shape[1:])), v]) for name, v in inputs.items()}
    A, S, rows = -np.exp(p["A_log"]), np.zeros((heads, spec.state_size, size)), []
    for t in range(len(x)):
        u, maps = (
            ACTIVATIONS[spec.activation](np.sum(v[t : t + taps] * p[name]["weight"], 0) + p[name].get("bias", 0))
            for name, v in inputs.items()
        )
        B, C = np.repeat(maps, heads // spec.groups, axis=1)
        dt = np.clip(np.log1p(np.exp(factors[4] * dts[t] + p["dt_bias"])), spec.dt_limit[0], spec.dt_limit[1])
        S = np.exp(dt * A)[:, None, None] * S + B[:, :, None] * (dt[:, None] * u)[:, None]
        y = np.einsum("hnp,hn->hp", S, C) + p["D"][:, None] * u
        gate = silu(factors[0] * pair[t, 0])
        if spec.norm == "gate_first":
            y = normed(y * gate, p, spec)
        else:
            y = gate * (normed(y, p, spec) if spec.norm else y)
        rows.append(np.tensordot(y, p["output"]["weight"], 2) + p["output"].get("bias", 0))
    return np.stack(rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_equations(name, bold):
    spec, blueprint = blueprint_of(**OPTIONS[name])
    params, x = bold(blueprint, 0.2), jax.random.normal(jax.random.key(2), (2, TIME, WIDTH))
    got = jax.jit(lambda params, x: blueprint(params)(x, Context.rows(2, TIME))[0])(params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, y in zip(np.asarray(x, np.float64), got, strict=True):
        want = by_the_equations(row, wide, spec)
        np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


def test_starts_as_published():
    blueprint = Blueprint(lambda: Mamba2Spec(heads=2048, head_size=1).build(16, Initialization()))
    params = jax.jit(blueprint.init)(jax.random.key(0))
    rates = np.exp(params["A_log"])
    assert 1 <= rates.min() < 1.1 and 15.9 < rates.max() <= 16.001 and np.mean(rates) == pytest.approx(8.5, abs=0.3)
    step = np.log10(jax.nn.softplus(params["dt_bias"]))
    assert -3.001 < step.min() < -2.95 and -1.05 < step.max() < -0.999
    assert np.all(np.asarray(params["D"]) == 1) and np.all(np.asarray(params["norm"]["scale"]) == 1)


def test_recurrence_constants_are_not_decayed():
    declared = blueprint_of()[1].declarations
    assert not any(declared[name].decay for name in ("A_log", "D", "dt_bias"))


def test_log_decay_is_negative_and_per_head(bold):
    spec, blueprint = blueprint_of(heads=4, dt_limit=[0.02, 0.5])
    params, x = bold(blueprint, 0.2), 30 * jax.random.normal(jax.random.key(2), (1, TIME, WIDTH))
    decay = blueprint(params).log_decay(x, Context.rows(1, TIME))
    assert decay.shape == (1, TIME, 4) and decay.dtype == jnp.float32
    steps = np.asarray(decay / -jnp.exp(params["A_log"]))
    np.testing.assert_allclose([steps.min(), steps.max()], [0.02, 0.5], rtol=1e-5)


def test_sizes_and_costs_by_hand():
    def sizes(width, **options):
        spec = Mamba2Spec(**options).resolved(width)
        return spec.heads, spec.head_size, spec.expand

    assert sizes(16) == (1, 32, 2.0) and sizes(256) == (8, 64, 2.0)
    assert sizes(32, heads=4) == (4, 16, 2.0) and sizes(32, head_size=8) == (8, 8, 2.0)
    assert sizes(32, heads=3, head_size=8) == (3, 8, 0.75)
    spec = Mamba2Spec(heads=4, head_size=8, groups=2, state_size=16)
    want = 2 * 32 * (2 * 32 + 2 * 2 * 16 + 4) + 2 * 32 * 32 + 2 * 4 * (32 + 64) + 5 * 32 * 16
    assert spec.flops_per_token(32, 64) == want
    blueprint = Blueprint(lambda: spec.build(32, Initialization()))
    cache = jax.eval_shape(lambda: blueprint(blueprint.init(jax.random.key(0))).init_cache(3, 10_000, jnp.bfloat16))
    shapes = {name: leaf.shape for name, leaf in cache.items()}
    assert shapes == {
        "state": (3, 4, 16, 8), "convolution": (3, 3, 4, 8), "input_output_convolution": (3, 3, 2, 2, 16),
        "segment": (3,),
    }  # fmt: skip
    assert cache["state"].dtype == jnp.float32 and cache["convolution"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_size": 20}, "mixer.head_size: 20 does not divide the 64 inner values; nearest that do: 8, 16, 32"),
        ({"heads": 5}, "mixer.heads: 5 does not divide the 64 inner values; nearest that do"),
        ({"heads": 4, "groups": 3}, "mixer.groups: 3 do not divide 4 heads; nearest that do: 1, 2, 4"),
        ({"dt_limit": [0.5, 0.1]}, "mixer.dt_limit: its least value 0.5 is above its largest, 0.1"),
    ],
)
def test_faults_name_the_key(options, words):
    block = {"mixer": {"kind": "mamba2", **options}}
    with pytest.raises(ConfigError) as error:
        ModelSpec.model_validate({"width": 32, "vocab_size": 7, "blocks": {"layer": block}, "layout": ["layer"]})
    assert words in str(error.value)


@pytest.mark.parametrize("multipliers", [[1.0] * 4, [1.0] * 6])
def test_multipliers_are_five(multipliers):
    with pytest.raises(ValueError, match="multipliers"):
        Mamba2Spec.model_validate({"multipliers": multipliers})
