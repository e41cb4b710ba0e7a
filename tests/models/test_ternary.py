"""Ternary maps: exact in bfloat16, trained through their rounding, and in the channel mixer too."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.context import Context
from efficient_lm.models.ffns.dense import SwiGLUSpec
from efficient_lm.models.layers.ternary import TernaryLinear
from efficient_lm.models.parameters import Blueprint, Initialization


def test_ternary_maps_are_exact_in_bfloat16_and_gradients_pass_the_rounding(drawn):
    blueprint = Blueprint(lambda: TernaryLinear({"embed": 64}, {"mlp": 5}, init=Initialization()))
    params = drawn(blueprint)
    x = jnp.round(127 * jax.random.uniform(jax.random.key(1), (9, 64), minval=-1)).at[:, 0].set(127.0)
    wide, narrow = (blueprint(params)(x.astype(dtype)) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=2**-7, atol=0)

    gradient = jax.grad(lambda weight: jnp.sum(blueprint({**params, "weight": weight})(x) * wide))(params["weight"])
    normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
    np.testing.assert_allclose(gradient, normed.T @ wide, rtol=1e-4, atol=1e-4 * float(jnp.abs(gradient).max()))
    levels = np.unique(np.round(np.asarray(blueprint(params)(jnp.eye(64))) / np.abs(params["weight"]).mean(), 3))
    assert len(levels) == 3, "a single input finds three weights"


def test_a_ternary_channel_mixer_is_made_of_such_maps(drawn):
    spec = SwiGLUSpec(hidden=24, ternary=True)
    blueprint = Blueprint(lambda: spec.build(16, Initialization()))
    params, x = drawn(blueprint), jax.random.normal(jax.random.key(1), (1, 5, 16))
    y = blueprint(params)(x, Context.rows(1, 5))[0]
    up = Blueprint(lambda: TernaryLinear({"embed": 16}, {"gate_up": 2, "mlp": 24}, batch=1, init=Initialization()))
    down = Blueprint(lambda: TernaryLinear({"mlp": 24}, {"embed": 16}, init=Initialization()))
    both = up(params["gate_up"])(x)
    np.testing.assert_array_equal(y, down(params["down"])(jax.nn.silu(both[..., 0, :]) * both[..., 1, :]))
    doubled = params["gate_up"]["weight"].at[:, 1].multiply(2.0)
    again = up({**params["gate_up"], "weight": doubled})(x)
    np.testing.assert_allclose(again, both * jnp.array([1.0, 2.0])[:, None], rtol=1e-5)
