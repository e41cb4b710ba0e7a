"""Parts, costs and figures of models whose layers share keys, with several streams and embeddings by layer."""

from copy import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.elastic.budget import Meter
from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.search.base import Space
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.elastic.switched import ChosenStack
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.diagnostics import Diagnostics
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.validation import validate

TIME = 12
TOKENS = jax.random.randint(jax.random.key(9), (2, TIME), 0, 32)


def model_of(**elastic):
    """Four layers, of which the second and the fourth take the keys and values of the one before."""
    block = {
        "ffn": {"kind": "swiglu", "hidden": 16}, "laurel": {"rank": 2}, "layer_input": {"size": 4},
        "streams": {"kind": "altup", "count": 2},
    }  # fmt: skip
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2}
    blocks = {"own": block | {"mixer": mixer}, "shared": block | {"mixer": mixer | {"shares_keys": True}}}
    values = {"width": 16, "vocab_size": 32, "blocks": blocks, "layout": ["own", "shared"], "repeats": 2}
    return validate(ModelSpec, values | {"layer_embedding": {"size": 4}, "elastic": elastic}, "model").build()


def test_parts_chosen_while_running_are_the_submodel(drawn):
    model = model_of(ffn=[0.5, 1])
    params = drawn(model)
    choice = choose(model, {"ffn": [0.5, 1, 1, 0.5]})
    small = submodel_spec(model, choice).build()
    expected = jax.jit(small.logits)(submodel_parameters(model, small, params, choice.layers), TOKENS)

    def chosen(params, levels):
        part = copy(model)
        part.stack = ChosenStack(model, nested_models(model), levels)
        return part.logits(params, TOKENS)

    found = jax.jit(chosen)(params, jnp.array([0, 1, 1, 0]))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_parts_of_heads_are_the_same_in_all_layers():
    model = model_of(heads=[0.5, 1])
    for of_layers in (
        lambda: ChosenStack(model, nested_models(model), jnp.zeros(4, jnp.int32)),
        lambda: Space.of(model, Meter(TIME)),
    ):
        with pytest.raises(ConfigError, match=r"model.elastic.heads: layers take the keys and values of others"):
            of_layers()
    small = submodel_spec(model, choose(model, {"heads": 0.5})).build()
    assert small.stack.sharing.sources == [None, 0, None, 2]


def test_costs_of_layers_and_what_is_around_them_add_up():
    model = model_of(ffn=[0.5, 1])
    costs = Meter(TIME).model(model)
    caches = jax.eval_shape(lambda: model.init_caches(1, TIME))
    assert costs["params"] == count_parameters(model.declarations)
    assert costs["flops_per_token"] == pytest.approx(model.flops_per_token(TIME))
    assert costs["cache_bytes"] == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    # Half of the layers keep nothing: keys and values, two heads of four values, with position, document and count.
    assert costs["cache_bytes"] == 2 * (TIME * (2 * 2 * 4 + 2) + 1) * 4


def test_latency_is_measured_of_such_layers_too():
    measured = Meter(TIME, latency=True).model(model_of(ffn=[0.5, 1]))
    assert measured["latency_ms"] > 0


def test_figures_of_each_layer(drawn):
    model = model_of(ffn=[0.5, 1])
    figures = Diagnostics(model).measure(drawn(model), TOKENS)
    assert [layer["attention_entropy"].shape for layer in figures] == [(4,)] * 4
    assert all(np.all(layer["attention_entropy"] > 0) for layer in figures)
