"""Mixers with one number of state per channel, or only a convolution, against their equations token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.mixers.rg_lru import RGLRUSpec, bounded_root
from efficient_lm.models.mixers.short_conv import ShortConvSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 16, 24


class Built:
    """A mixer with parameters that all matter, its outputs, and both in float64."""

    def __init__(self, spec):
        self.spec, self.blueprint = spec, Blueprint(lambda: spec.build(WIDTH, Initialization()))
        start = jax.jit(self.blueprint.init)(jax.random.key(0))
        keys = iter(jax.random.split(jax.random.key(1), 32))
        self.params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), start)
        self.x = jax.random.normal(jax.random.key(2), (1, TIME, WIDTH))
        self.y, self.log_decay = jax.jit(self.run)(self.x)
        self.wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.params)
        self.rows = np.asarray(self.x[0], np.float64)

    def run(self, x):
        module, context = self.blueprint(self.params), Context.rows(1, TIME)
        decays = hasattr(module, "log_decay")
        return module(x, context)[0][0], module.log_decay(x, context)[0] if decays else None

    def linear(self, name, x):
        found = self.wide[name]
        return np.einsum("ti,i...->t...", x, found["weight"]) + found.get("bias", 0)

    def output(self, y):
        found = self.wide["output"]
        return y.reshape(len(y), -1) @ found["weight"].reshape(-1, WIDTH) + found.get("bias", 0)

    def convolved(self, x):
        taps, bias = self.wide["convolution"]["weight"], self.wide["convolution"].get("bias", 0)
        padded = np.concatenate([np.zeros((len(taps) - 1, *x.shape[1:])), x])
        return np.stack([np.sum(taps * padded[t : t + len(taps)], 0) + bias for t in range(len(x))])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def check(got, want):
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=2e-5)


@pytest.mark.parametrize("options", [{"heads": 4, "inner": 24}, {"heads": 2, "bias": False, "convolution": 2}])
def test_rg_lru_equals_its_equations(options):
    mixer = Built(RGLRUSpec(**options))
    both = mixer.linear("branches", mixer.rows)
    u = mixer.convolved(both[:, 1])
    gates = {
        name: sigmoid(np.einsum("thd,hde->the", u, mixer.wide[name]["weight"]) + mixer.wide[name]["bias"])
        for name in ("input_gate", "recurrence_gate")
    }
    h, rows = np.zeros_like(u[0]), []
    for t in range(TIME):
        a = np.exp(-8 * softplus(mixer.wide["decay"]) * gates["recurrence_gate"][t])
        h = a * h + (np.sqrt(1 - a**2) if t else 1.0) * gates["input_gate"][t] * u[t]
        rows.append(gelu_tanh(both[t, 0]) * h)
    check(mixer.y, mixer.output(np.stack(rows)))
    check(mixer.log_decay, -8 * softplus(mixer.wide["decay"]) * gates["recurrence_gate"])


def test_rg_lru_starts_with_long_memories():
    spec = RGLRUSpec(heads=4, inner=4096)
    params = jax.jit(Blueprint(lambda: spec.build(8, Initialization())).init)(jax.random.key(0))
    strongest = np.exp(-8 * softplus(np.asarray(params["decay"], np.float64)))
    assert strongest.min() == pytest.approx(0.9, abs=1e-3)
    assert strongest.max() == pytest.approx(0.999, abs=1e-3)
    assert strongest.mean() == pytest.approx((0.9 + 0.999) / 2, abs=3e-3)


def test_the_root_has_a_finite_slope_everywhere():
    slope = jax.vmap(jax.grad(bounded_root))(jnp.array([0.0, 1e-12, 1e-4, 0.25]))
    np.testing.assert_allclose(slope, [1000, 1000, 50, 1], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": True, "convolution": 5}])
def test_short_conv_equals_its_equations(options):
    mixer = Built(ShortConvSpec(**options))
    before, after, u = np.moveaxis(mixer.linear("branches", mixer.rows), 1, 0)
    check(mixer.y, mixer.output(after * mixer.convolved(before * u)))


def test_sizes_and_costs_by_hand():
    assert RGLRUSpec().inner_size(2560) == 3408, "four thirds of the width, in 16 heads"
    assert RGLRUSpec(heads=2).resolved(24).inner == 32
    # Two branches of 32 and one back, four taps, two gates that read 16 values each, a multiplication and an addition.
    assert RGLRUSpec(heads=2, inner=32).flops_per_token(24, 99) == 2 * 32 * (3 * 24 + 4 + 2 * 16 + 1)
    assert ShortConvSpec().flops_per_token(8, 99) == 2 * 8 * (3 * 8 + 3 + 8 + 1)
    faults = dict(RGLRUSpec(heads=5, inner=32).faults(24))
    assert faults == {"heads": "5 do not divide 32 inner channels; nearest that do: 2, 4, 8"}


@pytest.mark.parametrize("spec", [RGLRUSpec(heads=2), ShortConvSpec()])
def test_the_cache_is_of_one_size_for_any_length(spec):
    module = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    made = [
        jax.eval_shape(
            lambda n=n: module(jax.tree.map(lambda d: None, module.declarations)).init_cache(2, n, "bfloat16")
        )
        for n in (1, 9999)
    ]
    assert made[0] == made[1]
    assert made[0]["convolution"].dtype == jnp.bfloat16
    assert "state" not in made[0] or made[0]["state"].dtype == jnp.float32
