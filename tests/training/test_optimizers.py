"""AdamW against the algorithm written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.optimizers import AdamWSpec, OptimizerSpec
from efficient_lm.training.precision import PrecisionSpec
from efficient_lm.validation import validate


class Holder(Spec):
    optimizer: OneOf[OptimizerSpec]


def steps(spec, params, mask, gradients, rate):
    optimizer = spec.build(rate, mask)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def by_hand(spec, value, decayed, gradients, rate):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    value = np.asarray(value, np.float64)
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step, gradient in enumerate(gradients):
        gradient = np.asarray(gradient, np.float64)
        first = spec.beta1 * first + (1 - spec.beta1) * gradient
        second = spec.beta2 * second + (1 - spec.beta2) * gradient**2
        mean, square = first / (1 - spec.beta1 ** (step + 1)), second / (1 - spec.beta2 ** (step + 1))
        decay = spec.weight_decay * value if decayed else 0.0
        value = value - rate(step) * (mean / (np.sqrt(square) + spec.epsilon) + decay)
    return value


def test_three_steps_are_those_of_the_paper():
    spec = AdamWSpec(learning_rate=0.1, weight_decay=0.3)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(keys[0], (3, 2)) for name in ("decayed", "free")}
    gradients = [{name: jax.random.normal(key, (3, 2)) for name in params} for key in keys[1:]]
    found = steps(spec, params, {"decayed": True, "free": False}, gradients, lambda step: 0.1 / (1 + step))
    for name in params:
        series = [gradient[name] for gradient in gradients]
        wanted = by_hand(spec, params[name], name == "decayed", series, lambda step: 0.1 / (1 + step))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_decay_touches_only_what_declares_it():
    params = {"decayed": jnp.ones(4), "free": jnp.ones(4)}
    zero = jax.tree.map(jnp.zeros_like, params)
    found = steps(AdamWSpec(weight_decay=0.1), params, {"decayed": True, "free": False}, [zero], lambda step: 0.5)
    np.testing.assert_allclose(found["decayed"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(found["free"], 1.0)


def test_state_is_float32_under_any_compute_type():
    state = AdamWSpec().build(lambda step: 1.0, {"w": True}).init({"w": jnp.ones(2)})
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 2 and all(leaf.dtype == jnp.float32 for leaf in floats)
    assert PrecisionSpec(compute="bfloat16").dtype == jnp.bfloat16
    assert PrecisionSpec().dtype == jnp.float32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "adam"}, "optimizer.kind: unknown optimizer kind 'adam'; did you mean 'adamw'"),
        ({"kind": "adamw", "learning_rate": 0}, "optimizer.learning_rate: expected a number above 0"),
        ({"kind": "adamw", "beta2": 1.5}, "optimizer.beta2: expected at most 1; got 1.5"),
        ({"kind": "adamw", "weight_decay": -0.1}, "optimizer.weight_decay: expected at least 0; got -0.1"),
    ],
)
def test_faults(values, said):
    with pytest.raises(ConfigError, match=said):
        validate(Holder, {"optimizer": values})
