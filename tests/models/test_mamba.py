"""Mamba against its equations, written out token by token, its start, its options and its costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.mixers.mamba import MambaSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 24, 21
OPTIONS = {
    "plain": {},
    "normed": {"inner_norm": {"kind": "rmsnorm"}, "bias": True, "output_bias": True, "activation": "gelu"},
    "constant": {"selective": False, "convolution_bias": False, "expand": 1.5},
}
ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "gelu": lambda x: np.asarray(jax.nn.gelu(x, approximate=False))}


def blueprint_of(**options):
    spec = MambaSpec.model_validate({"state_size": 5, "rank": 3, **options})
    return spec, Blueprint(lambda: spec.build(WIDTH, Initialization()))


def run(blueprint, params, x):
    return jax.jit(lambda params, x: blueprint(params)(x, Context.rows(*x.shape[:2]))[0])(params, x)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale


def by_the_equations(x, p, spec):
    """`x [time, width]` → the same in float64, one token at a time."""
    inner, taps = len(p["D"]), spec.convolution
    pairs = x @ p["input_gate"]["weight"].reshape(WIDTH, -1)
    pairs = pairs + p["input_gate"]["bias"].reshape(-1) if spec.bias else pairs
    before = np.concatenate([np.zeros((taps - 1, inner)), pairs[:, :inner]])
    A, h, rows = -np.exp(p["A_log"]), np.zeros(p["A_log"].shape), []
    for t in range(len(x)):
        u = np.sum(before[t : t + taps] * p["convolution"]["weight"], axis=0)
        u = ACTIVATIONS[spec.activation](u + p["convolution"]["bias"] if spec.convolution_bias else u)
        if spec.selective:
            low = u @ p["dt_down"]["weight"]
            B, C = np.einsum("d,dkn->kn", u, p["input_output"]["weight"])
            if spec.inner_norm:
                parts = zip((low, B, C), ("dt_norm", "input_norm", "output_norm"), strict=True)
                low, B, C = (rms(part, p[name]["scale"]) for part, name in parts)
            raw = low @ p["dt_up"] + p["dt_bias"]
        else:
            raw, (B, C) = p["dt_bias"], p["constants"]
        dt = np.log1p(np.exp(raw))
        h = np.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
        y = (h @ C + p["D"] * u) * ACTIVATIONS["silu"](pairs[t, inner:])
        rows.append(y @ p["output"]["weight"] + (p["output"]["bias"] if spec.output_bias else 0))
    return np.stack(rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_equations(name, bold):
    spec, blueprint = blueprint_of(**OPTIONS[name])
    params, x = bold(blueprint, 0.2), jax.random.normal(jax.random.key(2), (2, TIME, WIDTH))
    got = run(blueprint, params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, y in zip(np.asarray(x, np.float64), got, strict=True):
        want = by_the_equations(row, wide, spec)
        np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


def test_starts_as_published():
    params = jax.jit(Blueprint(lambda: MambaSpec(expand=64).build(32, Initialization())).init)(jax.random.key(0))
    np.testing.assert_allclose(params["A_log"], np.log(np.broadcast_to(np.arange(1, 17), (2048, 16))), rtol=1e-6)
    assert np.all(np.asarray(params["D"]) == 1) and np.all(np.asarray(params["convolution"]["bias"]) == 0)
    step = np.log10(jax.nn.softplus(params["dt_bias"]))
    assert -3.001 < step.min() < -2.95 and -1.05 < step.max() < -0.999
    assert np.mean(step) == pytest.approx(-2, abs=0.05)
    assert params["dt_up"].shape == (2, 2048)
    assert 0.7 < float(jnp.abs(params["dt_up"]).max()) <= 2**-0.5 + 1e-6


def test_recurrence_constants_are_not_decayed():
    declared = blueprint_of()[1].declarations
    assert not any(declared[name].decay for name in ("A_log", "D", "dt_bias"))
    assert declared["dt_up"].decay and declared["dt_up"].matrix == ((0,), (1,))


def test_without_selection_it_is_one_convolution(bold):
    """Linear and time-invariant behind its input map: what an input does does not depend on the others."""
    spec, blueprint = blueprint_of(selective=False, activation="identity")
    params = bold(blueprint, 0.2)
    params["input_gate"]["weight"] = params["input_gate"]["weight"].at[:, 1].set(0.0)
    params["convolution"]["bias"] = jnp.zeros_like(params["convolution"]["bias"])
    free = blueprint_of(selective=False, activation="identity", bias=True)[1]
    gates = jnp.stack([jnp.zeros(spec.inner_size(WIDTH)), jnp.ones(spec.inner_size(WIDTH))])
    params["input_gate"]["bias"] = gates
    impulse = jnp.zeros((2, TIME, WIDTH)).at[0, 0].set(1.0).at[1, 5].set(1.0)
    first, later = run(free, params, impulse)
    assert np.abs(first).max() > 0.1
    np.testing.assert_allclose(later[5:], first[:-5], atol=1e-5 * np.abs(first).max())


def test_log_decay_is_that_of_the_recurrence(bold):
    spec, blueprint = blueprint_of()
    params, x = bold(blueprint, 0.2), jax.random.normal(jax.random.key(2), (1, TIME, WIDTH))
    decay = jax.jit(lambda params, x: blueprint(params).log_decay(x, Context.rows(1, TIME)))(params, x)
    assert decay.shape == (1, TIME, 48, 5) and decay.dtype == jnp.float32
    assert float(decay.max()) < 0
    ratio = decay / -jnp.exp(params["A_log"])
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-5)


def test_sizes_and_costs_by_hand():
    spec = MambaSpec().resolved(100)
    assert (spec.inner, spec.rank, spec.expand) == (200, 7, 2.0)
    projections = 2 * (100 * 400 + 4 * 200 + 200 * (7 + 32) + 7 * 200 + 200 * 100)
    assert spec.flops_per_token(100, 512) == projections + 7 * 200 * 16
    blueprint = blueprint_of()[1]
    cache = jax.eval_shape(lambda: blueprint(blueprint.init(jax.random.key(0))).init_cache(2, 10_000, jnp.bfloat16))
    assert (cache["state"].shape, cache["state"].dtype) == ((2, 48, 5), jnp.float32)
    assert (cache["convolution"].shape, cache["convolution"].dtype) == ((2, 3, 48), jnp.bfloat16)
