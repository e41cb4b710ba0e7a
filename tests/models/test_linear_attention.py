"""Linear attention by its definition, as weights over the tokens seen, and its feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.layers.feature_maps import LARGEST_EXPONENT, HedgehogSpec, TaylorSpec
from efficient_lm.models.mixers.attention import AttentionSpec
from efficient_lm.models.mixers.based import BasedSpec
from efficient_lm.models.mixers.linear_attention import HedgehogAttentionSpec, LinearAttentionSpec
from efficient_lm.models.parameters import Blueprint, Initialization
from efficient_lm.validation import validate

MAPS = {
    "elu": ({"kind": "elu"}, lambda x, params: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))),
    "relu": ({"kind": "relu"}, lambda x, params: np.maximum(x, 0)),
    "softmax": ({"kind": "hedgehog"}, lambda x, params: softmax(both(x, params), -1)),
    "exp": ({"kind": "hedgehog", "softmax": False}, lambda x, params: np.exp(both(x, params))),
}


def both(x, params):
    turned = np.einsum("thd,hde->the", x, params["weight"]) + params["bias"]
    return np.concatenate([turned, -turned], -1)


def attended(weights, v):
    """`weights [heads, time, time]` of every token for every other, and `v [time, heads, size]` → as `v`."""
    seen = np.tril(weights)
    return np.einsum("hts,shv->thv", seen / np.maximum(seen.sum(-1, keepdims=True), 1e-12), v)


@pytest.mark.parametrize("name", MAPS)
def test_equals_its_definition(build_mixer, name):
    choice, function = MAPS[name]
    mixer = build_mixer(LinearAttentionSpec.model_validate({"heads": 2, "key_size": 6, "feature_map": choice}))
    pair = np.moveaxis(mixer.linear("query_key", mixer.x), 1, 0)
    q, k = (function(x, mixer.params.get(n)) for x, n in zip(pair, ("query_features", "key_features"), strict=True))
    y = attended(np.einsum("thf,shf->hts", q, k), mixer.linear("value", mixer.x))
    mixer.assert_equal(mixer.output(y))


def test_taylor_is_the_exponential_to_second_order(build_mixer):
    mixer = build_mixer(LinearAttentionSpec(heads=2, key_size=5, feature_map=TaylorSpec()))
    q, k = np.moveaxis(mixer.linear("query_key", mixer.x), 1, 0)
    s = np.einsum("thk,shk->hts", q, k) / np.sqrt(5)
    mixer.assert_equal(mixer.output(attended(1 + s + s**2 / 2, mixer.linear("value", mixer.x))))
    assert mixer.spec.state_shape(16) == (2, 1 + 5 + 15, 9)


def test_hedgehog_is_linear_attention_with_learned_maps(build_mixer):
    named, plain = HedgehogAttentionSpec(heads=2), LinearAttentionSpec(heads=2, feature_map=HedgehogSpec())
    np.testing.assert_array_equal(build_mixer(named).y, build_mixer(plain).y)


def test_positions_turn_queries_and_keys_before_the_map(build_mixer):
    options = {"heads": 2, "position": {"kind": "rotary"}}
    turned, plain = (build_mixer(LinearAttentionSpec.model_validate(o)) for o in (options, {"heads": 2}))
    np.testing.assert_allclose(turned.y[0], plain.y[0], atol=1e-6)
    assert np.abs(turned.y[1:] - plain.y[1:]).max() > 1e-2


def test_hedgehog_starts_from_the_identity_and_stays_finite():
    spec = HedgehogSpec(softmax=False)
    blueprint = Blueprint(lambda: spec.build(2, 3, Initialization()))
    params = jax.jit(blueprint.init)(jax.random.key(0))
    x = jnp.array([0.0, 1.0, 1e4]) * jnp.ones((1, 1, 2, 3))
    found = blueprint(params)(x)
    largest = np.exp(LARGEST_EXPONENT)
    np.testing.assert_allclose(found[0, 0, 1], [1, np.e, largest, 1, 1 / np.e, 1 / largest], rtol=1e-6)


def test_a_query_that_no_key_resembles_gets_nothing(drawn):
    spec = LinearAttentionSpec.model_validate(
        {"heads": 1, "key_size": 2, "value_size": 2, "feature_map": {"kind": "relu"}}
    )
    module = Blueprint(lambda: spec.build(2, Initialization()))
    params = jax.tree.map(jnp.ones_like, drawn(module))
    params["query_key"]["weight"] = params["query_key"]["weight"].at[:, 0].set(-1)
    y = module(params)(jnp.ones((1, 3, 2)), Context.rows(1, 3))[0]
    assert np.all(np.asarray(y) == 0)


@pytest.mark.parametrize("kind", ["elu", "taylor", "hedgehog"])
def test_queries_of_any_size_are_answered(kind, drawn):
    """Features of 1e-30, and those whose products would overflow, still weigh equal keys equally."""
    spec = LinearAttentionSpec.model_validate({"heads": 1, "key_size": 1, "feature_map": {"kind": kind}})
    module = Blueprint(lambda: spec.build(2, Initialization()))
    params = jax.tree.map(jnp.ones_like, drawn(module))
    x = jnp.array([[[1.0, 2.0], [1.0, 4.0], [1.0, 6.0]]])

    @jax.jit
    @jax.value_and_grad
    def answer(sizes):
        maps = jnp.zeros((2, 2, 1, 1)).at[0, :, 0, 0].set(sizes)
        y, _ = module({**params, "query_key": {"weight": maps}})(x, Context.rows(1, 3))
        return y[0, -1, 0]

    for query, key in ((-70.0, 0.0), (1e-20, 1e-20), (1e12, 1e12)):
        value, slope = answer(jnp.array([query, key]))
        # Two columns, each with the mean over the tokens of the sum of both inputs.
        np.testing.assert_allclose(value, 2 * (1 + 4), rtol=1e-5)
        assert np.all(np.isfinite(slope))


def test_based_is_the_sum_of_its_parts(build_mixer):
    mixer = build_mixer(BasedSpec(heads=2, feature_size=4, window=5))
    linear = LinearAttentionSpec(heads=2, key_size=4, feature_map=TaylorSpec())
    window = AttentionSpec(heads=2, window=5)
    parts = [build_mixer(spec, params=mixer.raw[name]) for spec, name in ((linear, "first"), (window, "second"))]
    mixer.assert_equal(np.asarray(parts[0].y, np.float64) + np.asarray(parts[1].y, np.float64))
    assert mixer.spec.flops_per_token(16, 64) == linear.flops_per_token(16, 64) + window.flops_per_token(16, 64)


def test_costs_by_hand(cache_shapes):
    spec = HedgehogAttentionSpec(heads=2)
    # Four maps of the width, two learned maps of two heads of 8; four operations per entry of 16 features by 9 columns.
    assert spec.flops_per_token(16, 99) == 2 * (4 * 16 * 16 + 2 * 2 * 8 * 8) + 4 * 2 * 16 * 9
    assert cache_shapes(spec, 9999)["state"].shape == (2, 2, 16, 9)
    assert BasedSpec(heads=2).resolved(16).parts(16).first.mixer.state_shape(16) == (2, 153, 9)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"kind": "based", "heads": 5}, "mixer.heads: 5 heads do not divide width 32; nearest that do"),
        ({"kind": "hedgehog", "feature_map": {"kind": "elo"}}, "unknown feature map kind 'elo'; did you mean 'elu'"),
        ({"kind": "linear_attention", "position": {"kind": "alibi"}}, "mixer.position: 'alibi' adds to the logits"),
    ],
)
def test_faults_name_the_key(mixer, words):
    with pytest.raises(ConfigError) as error:
        validate(ModelSpec, {"width": 32, "vocab_size": 9, "blocks": {"a": {"mixer": mixer}}, "layout": ["a"]}, "model")
    assert words in str(error.value)
