"""The two selections of MambaMixer: what each of them sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.mixers.mamba_mixer import MambaMixerSpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 24, 9


@pytest.fixture(scope="module")
def built(drawn):
    spec = MambaMixerSpec(group=4, token={"state_size": 4}, channel={"state_size": 4})
    blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    params = drawn(blueprint, 0.3)
    x = jax.random.normal(jax.random.key(1), (1, TIME, WIDTH))
    return blueprint, params, x


def test_is_the_sum_of_its_parts(built):
    blueprint, params, x = built
    context = Context.rows(1, TIME)
    whole = blueprint(params)
    y, _ = whole.token(x, context)
    mixed = np.asarray(params["shares"][0] * x + params["shares"][1] * y)
    mixed = mixed / np.sqrt(np.mean(mixed**2, -1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    want = np.array(y)
    for t in range(TIME):
        groups = jnp.asarray(mixed[0, t].reshape(1, -1, 4), jnp.float32)
        steps = Context.rows(1, groups.shape[1])
        forward = whole.forward(groups, steps)[0]
        backward = whole.backward(groups[:, ::-1], steps)[0][:, ::-1]
        want[0, t] += np.asarray(forward + backward).reshape(-1)
    np.testing.assert_allclose(whole(x, context)[0], want, atol=2e-5 * np.abs(want).max())


def test_channels_of_one_token_see_each_other_and_no_other_token(built):
    blueprint, params, x = built

    def mixed(z):
        return blueprint(params)._mix_channels(z)

    slopes = np.abs(np.asarray(jax.jit(jax.jacrev(mixed))(x))[0, :, :, 0]).max(axis=(1, 3))
    assert np.all(np.diag(slopes) > 0)
    assert np.all(slopes[~np.eye(TIME, dtype=bool)] == 0)
    within = np.abs(np.asarray(jax.jit(jax.jacrev(lambda z: mixed(z)[0, 3]))(x))[:, 0, 3])
    assert np.mean(within > 0) > 0.95, "the first channels depend on the last and the last on the first"


def test_groups_that_do_not_divide_are_refused():
    blocks = {"layer": {"mixer": {"kind": "mamba_mixer", "group": 7}}}
    with pytest.raises(ConfigError, match=r"mixer.group: 7 channels do not divide width 24; nearest that do: "):
        ModelSpec.model_validate({"width": WIDTH, "vocab_size": 9, "blocks": blocks, "layout": ["layer"]})
