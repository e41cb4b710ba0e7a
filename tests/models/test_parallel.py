"""Parallel mixers: the sum of their branches, whatever these are, with one cache and one count of costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.parallel import ParallelSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 32, 12
MAMBA2 = {"kind": "mamba2", "heads": 4, "state_size": 8}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}
THREE = {
    "first": {"mixer": MAMBA2, "input_multiplier": 0.5, "output_multiplier": 3.0},
    "second": {"mixer": ATTENTION, "output_multiplier": 0.25},
    "third": {"mixer": {"kind": "mamba", "state_size": 4}, "input_multiplier": 2.0},
}


@pytest.fixture
def built(bold):
    """``built(options)`` → spec, blueprint and parameters."""

    def make(options):
        spec = ParallelSpec.model_validate(options).resolved(WIDTH)
        blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
        return spec, blueprint, bold(blueprint, 0.2)

    return make


def test_is_the_weighted_sum_of_its_branches(built):
    spec, blueprint, params = built(THREE)
    x, rows = jax.random.normal(jax.random.key(2), (2, TIME, WIDTH)), Context.rows(2, TIME)

    def apart(params, x):
        total = 0.0
        for name, branch in spec.branches.items():
            mixer = Blueprint(lambda branch=branch: branch.mixer.build(WIDTH, Initialization()))(params[name])
            total += branch.output_multiplier * mixer(branch.input_multiplier * x, rows)[0]
        return total

    got, want = jax.jit(lambda p, x: (blueprint(p)(x, rows)[0], apart(p, x)))(params, x)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
    assert set(params) == {"first", "second", "third"}


def test_the_cache_is_flat_and_every_leaf_begins_with_the_batch(built):
    _, blueprint, params = built(THREE)
    cache = blueprint(params).init_cache(3, 40, jnp.bfloat16)
    assert {name.split(".")[0] for name in cache} == {"first", "second", "third"}
    assert {"first.state", "second.key", "third.state", "first.segment"} <= set(cache)
    assert all(leaf.shape[0] == 3 for leaf in cache.values())
    assert cache["first.state"].dtype == jnp.float32 and cache["second.key"].dtype == jnp.bfloat16


def test_diagnostics_read_the_branch_that_has_them(built):
    _, blueprint, params = built(THREE)
    module, x, rows = blueprint(params), jnp.ones((1, TIME, WIDTH)), Context.rows(1, TIME)
    decay = module.log_decay(x, rows)
    assert decay.shape == (1, TIME, 4)
    np.testing.assert_array_equal(decay, module.first.log_decay(0.5 * x, rows))
    alone = built({"first": {"mixer": ATTENTION}, "second": {"mixer": ATTENTION}})
    assert not hasattr(alone[1](alone[2]), "log_decay")


def test_costs_add_up():
    spec = ParallelSpec.model_validate(THREE)
    parts = [branch.mixer.flops_per_token(WIDTH, 64) for branch in spec.branches.values()]
    assert spec.flops_per_token(WIDTH, 64) == sum(parts) and len(parts) == 3


def model_of(**branches):
    block = {"mixer": {"kind": "parallel", **branches}}
    return ModelSpec.model_validate({"width": WIDTH, "vocab_size": 7, "blocks": {"a": block}, "layout": ["a"] * 2})


def test_values_that_vary_with_depth_are_reached():
    spec = model_of(first={"mixer": {**ATTENTION, "window": [3, 5]}}, second={"mixer": {**MAMBA2, "heads": [2, 4]}})
    found = [(layer.mixer.first.mixer.window, layer.mixer.second.mixer.heads) for layer in spec.layers()]
    assert found == [(3, 2), (5, 4)]


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ({"second": {"mixer": {"kind": "attention", "heads": 5}}}, "a.mixer.second.mixer.heads: 5 heads do not divide"),
        ({"first": {"mixer": {**MAMBA2, "groups": 3}}}, "a.mixer.first.mixer.groups: 3 do not divide 4 heads"),
        (
            {"third": {"mixer": {"kind": "hydra", "head_size": 8}}},
            "a.mixer.third.mixer.kind: 'hydra' sees later",
        ),
    ],
)
def test_faults_of_the_branches_are_named(branches, words):
    with pytest.raises(ConfigError) as error:
        model_of(**branches)
    assert words in str(error.value)
