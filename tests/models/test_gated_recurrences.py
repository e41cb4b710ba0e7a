"""Mixers with one number of state per channel, or only a convolution, against their equations token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from efficient_lm.models.mixers.matmul_free import MatMulFreeSpec
from efficient_lm.models.mixers.rg_lru import RGLRUSpec, bounded_root
from efficient_lm.models.mixers.short_conv import ShortConvSpec
from efficient_lm.models.parameters import Blueprint, Initialization


def convolved(mixer, x):
    taps, bias = mixer.params["convolution"]["weight"], mixer.params["convolution"].get("bias", 0)
    padded = np.concatenate([np.zeros((len(taps) - 1, *x.shape[1:])), x])
    return np.stack([np.sum(taps * padded[t : t + len(taps)], 0) + bias for t in range(len(x))])


def softplus(x):
    return np.logaddexp(0, x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("options", [{"heads": 4, "inner": 24}, {"heads": 2, "bias": False, "convolution": 2}])
def test_rg_lru_equals_its_equations(build_mixer, options):
    mixer = build_mixer(RGLRUSpec(**options))
    both = mixer.linear("branches", mixer.x)
    u = convolved(mixer, both[:, 1])
    gates = {
        name: expit(np.einsum("thd,hde->the", u, mixer.params[name]["weight"]) + mixer.params[name]["bias"])
        for name in ("input_gate", "recurrence_gate")
    }
    log_decay = -8 * softplus(mixer.params["decay"]) * gates["recurrence_gate"]
    h, rows = np.zeros_like(u[0]), []
    for t, a in enumerate(np.exp(log_decay)):
        h = a * h + (np.sqrt(1 - a**2) if t else 1.0) * gates["input_gate"][t] * u[t]
        rows.append(gelu_tanh(both[t, 0]) * h)
    mixer.assert_equal(mixer.output(np.stack(rows)))
    mixer.assert_equal(log_decay, mixer.log_decay)


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
def test_short_conv_equals_its_equations(build_mixer, options):
    mixer = build_mixer(ShortConvSpec(**options))
    before, after, u = np.moveaxis(mixer.linear("branches", mixer.x), 1, 0)
    mixer.assert_equal(mixer.output(after * convolved(mixer, before * u)))


def ternary(x, params, matrix_axes):
    """`x [time, in]` through a ternary map, float64; `matrix_axes` of the weight make one matrix."""
    normed = params["norm"]["scale"] * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-8)
    step = np.abs(normed).max(-1, keepdims=True) / 127
    size = np.abs(params["weight"]).mean(matrix_axes, keepdims=True)
    weight = np.clip(np.round(params["weight"] / size), -1, 1) * size
    return np.einsum("ti,i...->t...", np.round(normed / step) * step, weight)


def test_matmul_free_equals_its_equations(build_mixer):
    mixer = build_mixer(MatMulFreeSpec(expand=1.5))
    forget, candidate, gate = np.moveaxis(ternary(mixer.x, mixer.params["branches"], (0, 2)), 1, 0)
    h, rows = np.zeros(24), []
    for f, c in zip(expit(forget), candidate * expit(candidate), strict=True):
        h = f * h + (1 - f) * c
        rows.append(h)
    mixer.assert_equal(ternary(expit(gate) * np.stack(rows), mixer.params["output"], (0, 1)))
    mixer.assert_equal(-softplus(-forget), mixer.log_decay)


def test_sizes_and_costs_by_hand():
    assert RGLRUSpec().inner_size(2560) == 3408, "four thirds of the width, in 16 heads"
    assert RGLRUSpec(heads=2).resolved(24).inner == 32
    # Two branches of 32 and one back, four taps, two gates that read 16 values each, a multiplication and an addition.
    assert RGLRUSpec(heads=2, inner=32).flops_per_token(24, 99) == 2 * 32 * (3 * 24 + 4 + 2 * 16 + 1)
    assert ShortConvSpec().flops_per_token(8, 99) == 2 * 8 * (3 * 8 + 3 + 8 + 1)
    assert MatMulFreeSpec(expand=2).flops_per_token(8, 99) == 2 * 16 * (4 * 8 + 1)
    faults = dict(RGLRUSpec(heads=5, inner=32).faults(24))
    assert faults == {"heads": "5 do not divide 32 inner channels; nearest that do: 2, 4, 8"}


@pytest.mark.parametrize("spec", [RGLRUSpec(heads=2), ShortConvSpec(), MatMulFreeSpec()])
def test_the_cache_is_of_one_size_for_any_length(cache_shapes, spec):
    made = cache_shapes(spec, 9999)
    assert made == cache_shapes(spec, 1)
    dtypes = {"convolution": jnp.bfloat16, "state": jnp.float32, "segment": jnp.int32}
    assert all(value.dtype == dtypes[name] for name, value in made.items())
