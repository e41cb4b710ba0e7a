"""Segments and periods of more than ten layers, whose names do not sort as they count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.layered import layer_parameters
from efficient_lm.validation import validate

COUNT, WIDTH, TIME = 12, 8, 3


@pytest.mark.parametrize(("repeats", "segments", "period"), [(1, COUNT, 1), (2, 1, COUNT)])
def test_more_than_ten_layers_that_differ_run_in_order(drawn, repeats, segments, period):
    """Their parameters are of the same shapes, so that others would do as well."""
    blocks = {
        f"block{number}": {"mixer": None, "ffn": {"kind": "mlp", "hidden": 8, "output_multiplier": 1 + number}}
        for number in range(COUNT)
    }
    values = {"width": WIDTH, "vocab_size": 11, "blocks": blocks, "layout": list(blocks), "final_norm": None}
    model = validate(ModelSpec, {**values, "repeats": repeats}, "model").build()
    assert (len(model.stack.segments), len(model.stack.segments[0].period)) == (segments, period)
    params, context = drawn(model), Context.rows(1, TIME)
    x = start = jax.random.normal(jax.random.key(0), (1, TIME, WIDTH))
    blueprints = [model.stack.periods[number % segments][number % period] for number in range(len(model.layers))]
    for blueprint, own in zip(blueprints, layer_parameters(model, params), strict=True):
        x, _, _ = blueprint(own)(x, context)
    found = jax.jit(lambda params, x: model.stack(params["stack"], x, context)[0])(params, start)
    np.testing.assert_allclose(found, x, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize(("name", "segments", "period"), [("jamba_3b", 1, 14), ("mamba2_hybrid", 11, 12)])
def test_published_layouts_of_so_many(name, segments, period):
    model = load_run_config([f"model={name}", "model.vocab_size=300"]).model.build()
    assert len(model.stack.segments) == segments
    assert max(len(part.period) for part in model.stack.segments) == period
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    assert jax.eval_shape(lambda params, tokens: model.logits(params, tokens), params, tokens).shape == (1, 8, 300)
