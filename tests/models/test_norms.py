"""Norms against their formulas, over one axis or several, with and without their parameters."""

import jax
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.layers.norms import LayerNormSpec, RMSNormSpec
from efficient_lm.models.parameters import Blueprint
from efficient_lm.validation import validate

X = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 3, 4))) + 0.5
AXES = [({"head_dim": 4}, (-1,)), ({"heads": 3, "head_dim": 4}, (-2, -1))]


def run(spec, axes):
    norm = Blueprint(lambda: spec.build(axes))
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), norm.init(jax.random.key(2))
    )
    assert all(leaf.shape == tuple(axes.values()) for leaf in params.values())
    return norm(params)(X), jax.tree.map(np.asarray, params)


@pytest.mark.parametrize(("axes", "over"), AXES)
@pytest.mark.parametrize("options", [{}, {"one_plus": True}, {"scale": False}])
def test_rms_norm(axes, over, options):
    got, params = run(RMSNormSpec(epsilon=0.1, **options), axes)
    want = X / np.sqrt(np.mean(X**2, over, keepdims=True) + 0.1)
    assert set(params) == (set() if options == {"scale": False} else {"scale"})
    np.testing.assert_allclose(got, want * (params.get("scale", 1) + ("one_plus" in options)), rtol=1e-5)


@pytest.mark.parametrize(("axes", "over"), AXES)
@pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, False)])
def test_layer_norm(axes, over, scale, bias):
    got, params = run(LayerNormSpec(epsilon=0.1, scale=scale, bias=bias), axes)
    want = (X - X.mean(over, keepdims=True)) / np.sqrt(X.var(over, keepdims=True) + 0.1)
    np.testing.assert_allclose(got, want * params.get("scale", 1) + params.get("bias", 0), rtol=1e-4, atol=1e-5)


def test_a_shift_needs_a_scale():
    with pytest.raises(ConfigError, match="one_plus shifts the scale, and scale is false"):
        validate(RMSNormSpec, {"one_plus": True, "scale": False}, "model.final_norm")
