"""Mixers of the delta rule against their equations, written out token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.delta_net import DeltaNetSpec
from efficient_lm.models.mixers.gated_delta_net import GatedDeltaNetSpec
from efficient_lm.models.mixers.kda import KDASpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 16, 12
SIZES = {"heads": 4, "key_heads": 2, "key_size": 5, "value_size": 6}
CASES = {
    "delta_net": DeltaNetSpec(**SIZES),
    "delta_net, gated, no convolution": DeltaNetSpec(**SIZES, gate=True, convolution=None, activation="relu"),
    "gated_delta_net": GatedDeltaNetSpec(**SIZES),
    "gated_delta_net, negative": GatedDeltaNetSpec(**SIZES, negative_eigenvalues=True, convolution=2),
    "kda": KDASpec(**SIZES, rank=3),
    "kda, negative": KDASpec(**(SIZES | {"key_heads": 4}), negative_eigenvalues=True, epsilon=0.1),
}  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def activated(name, x):
    return x * sigmoid(x) if name == "silu" else np.maximum(x, 0)


def mapped(x, weight):
    return np.einsum("te,e...->t...", x, weight)


def convolved(x, taps):
    y = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(len(taps), t + 1)):
            y[t] += taps[len(taps) - 1 - j] * x[t - j]
    return y


def inputs_of(name, spec, x, p):
    y = mapped(x, p[name]["weight"])
    if spec.convolution is not None:
        y = convolved(y, p[f"{name}_convolution"]["weight"])
    return activated(spec.activation, y)


def decay_of(spec, x, p):
    """float64 ``[time, heads, keys]`` of what each state is multiplied by."""
    whole = (len(x), spec.heads, spec.key_size)
    if spec.kind == "delta_net":
        return np.ones(whole)
    if spec.kind == "gated_delta_net":
        step = softplus(mapped(x, p["decay"]["weight"]) + p["dt_bias"])
        return np.broadcast_to(np.exp(-np.exp(p["A_log"]) * step)[..., None], whole)
    low = mapped(mapped(x, p["decay"]["down"]["weight"]), p["decay"]["up"]["weight"])
    return np.exp(-np.exp(p["A_log"])[:, None] * softplus(low + p["dt_bias"]))


def gate_of(spec, x, p):
    if spec.kind == "kda":
        return sigmoid(mapped(mapped(x, p["gate"]["down"]["weight"]), p["gate"]["up"]["weight"]))
    if spec.kind == "delta_net" and not spec.gate:
        return 1.0
    z = mapped(x, p["gate"]["weight"])
    return z * sigmoid(z)


def by_the_equations(spec, x, p):
    pair, v = inputs_of("query_key", spec, x, p), inputs_of("value", spec, x, p)
    pair = pair / np.sqrt(np.sum(pair**2, -1, keepdims=True) + 1e-6)
    q, k = pair[:, 0] / np.sqrt(spec.key_size), pair[:, 1]
    beta = sigmoid(mapped(x, p["beta"]["weight"])) * (2 if spec.negative_eigenvalues else 1)
    decay, y = decay_of(spec, x, p), np.zeros_like(v)
    for h in range(spec.heads):
        group, state = h // (spec.heads // spec.key_heads), np.zeros((spec.key_size, spec.value_size))
        for t in range(len(x)):
            key = k[t, group]
            erase = np.eye(spec.key_size) - beta[t, h] * np.outer(key, key)
            state = erase @ (decay[t, h][:, None] * state) + beta[t, h] * np.outer(key, v[t, h])
            y[t, h] = state.T @ q[t, group]
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + spec.epsilon) * p["norm"]["scale"] * gate_of(spec, x, p)
    return np.einsum("thv,hve->te", y, p["output"]["weight"])


@pytest.mark.parametrize("name", CASES)
def test_equals_its_equations(name, drawn):
    spec = CASES[name].resolved(WIDTH)
    mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    fresh = drawn(mixer)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), fresh)
    x = jax.random.normal(jax.random.key(2), (2, TIME, WIDTH))
    got = jax.jit(lambda params, x: mixer(params)(x, Context.rows(2, TIME))[0])(params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, y in zip(np.asarray(x, np.float64), got, strict=True):
        want = by_the_equations(spec, row, wide)
        np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["gated_delta_net", "kda"])
def test_log_decay_is_what_the_state_loses(name, drawn):
    spec = CASES[name]
    mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = drawn(mixer)
    x = jax.random.normal(jax.random.key(2), (1, TIME, WIDTH))
    found = np.asarray(mixer(params).log_decay(x, Context.rows(1, TIME)))[0]
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want = np.log(decay_of(spec, np.asarray(x[0], np.float64), wide))
    np.testing.assert_allclose(found if found.ndim == 3 else found[..., None] + 0 * want, want, rtol=1e-4)
    assert found.max() < 0


def test_a_state_can_turn_only_with_negative_eigenvalues(drawn):
    """With one key that never changes, the eigenvalue of the state along it is 1 - β."""
    for negative, lowest in ((False, 0.0), (True, -1.0)):
        mixer = Blueprint(lambda n=negative: DeltaNetSpec(negative_eigenvalues=n).build(WIDTH, Initialization()))
        params = jax.tree.map(lambda leaf: 1e3 * jnp.abs(leaf), drawn(mixer))
        beta = mixer(params)._strength(jnp.ones((1, 1, WIDTH)))
        np.testing.assert_allclose(1 - beta, lowest, atol=1e-6)


def test_decays_start_as_published():
    for spec, low in ((GatedDeltaNetSpec(heads=512, key_size=1), 0.01), (KDASpec(heads=512, key_size=1), 1.0)):
        mixer = Blueprint(lambda spec=spec: spec.build(WIDTH, Initialization()))
        params = jax.jit(mixer.init)(jax.random.key(0))
        rate, step = np.exp(params["A_log"]), softplus(np.asarray(params["dt_bias"], np.float64))
        assert low <= rate.min() and rate.max() <= 16 and abs(rate.mean() - (16 + low) / 2) < 0.7
        assert 0.99e-3 <= step.min() and step.max() <= 0.101
        assert abs(np.log(step).mean() - np.log(1e-2)) < 0.2, "uniform in the logarithm"
        undecayed = [name for name in ("A_log", "dt_bias") if not mixer.declarations[name].decay]
        assert undecayed == ["A_log", "dt_bias"]


@pytest.mark.parametrize(
    ("spec", "width", "sizes"),
    [
        (DeltaNetSpec(), 1024, (8, 8, 128, 128)),
        (KDASpec(), 2304, (18, 18, 128, 128)),
        (GatedDeltaNetSpec(), 2048, (6, 6, 256, 512)),
        (GatedDeltaNetSpec(heads=30), 3840, (30, 30, 96, 192)),
        (GatedDeltaNetSpec(heads=32, key_heads=16, key_size=128, value_size=128), 2048, (32, 16, 128, 128)),
        (DeltaNetSpec(key_size=64), 1024, (16, 16, 64, 64)),
    ],
)
def test_sizes_follow_from_the_width(spec, width, sizes):
    found = spec.resolved(width)
    assert (found.heads, found.key_heads, found.key_size, found.value_size) == sizes


def test_cost_by_hand():
    # Maps of 2 keys of 2 heads, of values and output, of β, α and the gate; taps; 3 products with the state, decay.
    maps = 2 * 32 * (2 * 2 * 5 + 2 * 4 * 6 + 4 + 4 + 4 * 6)
    spec = GatedDeltaNetSpec(**SIZES)
    assert spec.flops_per_token(32, 999) == maps + 2 * 4 * (20 + 24) + 7 * 4 * 5 * 6
    low_rank = 2 * 32 * (2 * 2 * 5 + 2 * 4 * 6 + 4) + 2 * 3 * (2 * 32 + 4 * 5 + 4 * 6)
    assert KDASpec(**SIZES, rank=3).flops_per_token(32, 9) == low_rank + 2 * 4 * (20 + 24) + 7 * 4 * 5 * 6
    gate = 2 * 32 * 4 * 6
    assert (
        DeltaNetSpec(**SIZES, gate=True).flops_per_token(32, 9) == DeltaNetSpec(**SIZES).flops_per_token(32, 9) + gate
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "gated_delta_net", "heads": 6, "key_heads": 4}, "mixer.key_heads: 4 do not divide 6 heads; nearest"),
        ({"kind": "kda", "heads": 64}, "mixer.heads: 64 heads leave no keys in width 16; at most 16"),
        ({"kind": "delta_net", "implementation": "cudnn"}, "implementation"),
    ],
)
def test_faults_name_the_key(options, words):
    blocks = {"layer": {"mixer": options}}
    with pytest.raises((ConfigError, ValueError)) as error:
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 9, "blocks": blocks, "layout": ["layer"]})
    assert words in str(error.value)
