"""How the halves of a block come into the residual stream: places of norms and constant factors."""

import jax
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, ROWS = 8, Context.rows(1, 5)
PARTS = {"mixer": {"kind": "short_conv"}, "ffn": {"kind": "swiglu", "hidden": 8}}
FACTORS = {"stream_multiplier": {"mixer": 2.5, "ffn": 3.5}, "residual_multiplier": {"mixer": 0.5, "ffn": 1.5}}


def rms(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("place", ["stream", "post", "pre"])
def test_factors_and_norms_by_the_formula(place, drawn):
    spec = BlockSpec.model_validate({**PARTS, **FACTORS, "norm_position": place})
    blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = jax.tree.map(lambda leaf: leaf * 1.5, drawn(blueprint))
    x = jax.random.normal(jax.random.key(1), (1, 5, WIDTH))
    block, want = blueprint(params), x
    for half, a, b in ((block.mixer, 2.5, 0.5), (block.ffn, 3.5, 1.5)):
        base = rms(want, 1.5) if place == "stream" else want
        y = half.inner(rms(base, 1.5) if place == "pre" else base, ROWS)[0]
        want = a * base + b * y
        want = rms(want, 1.5) if place == "post" else want
    np.testing.assert_allclose(block(x, ROWS)[0], want, rtol=2e-5, atol=2e-5)
    source = x if place == "post" else rms(x, 1.5)
    np.testing.assert_allclose(block.mixer_input(x, ROWS), source, rtol=1e-5)


def test_one_factor_for_parallel_halves(drawn):
    spec = BlockSpec.model_validate(
        {**PARTS, "residual": "parallel", "stream_multiplier": 2.0, "norm_position": "post"}
    )
    block = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params, x = drawn(block), jax.random.normal(jax.random.key(1), (1, 5, WIDTH))
    built = block(params)
    want = rms(2 * x + built.mixer.inner(x, ROWS)[0] + built.ffn.inner(x, ROWS)[0], 1.0)
    np.testing.assert_allclose(built(x, ROWS)[0], want, rtol=2e-5, atol=2e-5)


def test_equal_factors_are_one():
    given = BlockSpec.model_validate({**PARTS, "stream_multiplier": {"mixer": 2.0, "ffn": 2.0}})
    assert given.resolved(WIDTH) == BlockSpec.model_validate({**PARTS, "stream_multiplier": 2.0}).resolved(WIDTH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_position": "stream"}, "norm_position: stream needs residual: sequential"),
        ({"stream_multiplier": {"mixer": 2.0}}, "stream_multiplier: parallel halves share one stream: give one factor"),
    ],
)
def test_what_parallel_halves_cannot_have(options, words):
    block = {**PARTS, "residual": "parallel", **options}
    with pytest.raises(ConfigError) as error:
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 9, "blocks": {"a": block}, "layout": ["a"]})
    assert words in str(error.value)
