"""What tests of single mixers share."""

from functools import partial

import jax
import numpy as np
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, TIME = 16, 24


class BuiltMixer:
    """A mixer with parameters that all matter, what it makes of a row, and everything in float64.

    Attributes:
        x: the row, float64 ``[time, width]``.
        y, log_decay: the mixer's, float32; None for one without a decay.
        raw, params: the parameters, float32 and float64.
    """

    def __init__(self, drawn, spec, layer=0, layers=1, params=None):
        assert not list(spec.faults(WIDTH))
        self.spec, self.blueprint = spec.resolved(WIDTH), Blueprint(lambda: spec.build(WIDTH, Initialization()))
        self.raw = drawn(self.blueprint, 0.3) if params is None else params
        x, rows = jax.random.normal(jax.random.key(2), (1, TIME, WIDTH)), Context.rows(1, TIME)
        context = Context(rows.positions, rows.segment_ids, packed=False, layer=layer, layers=layers)

        @jax.jit
        def run(params, x):
            module = self.blueprint(params)
            decay = module.log_decay(x, context)[0] if hasattr(module, "log_decay") else None
            return module(x, context)[0][0], decay

        self.y, self.log_decay = run(self.raw, x)
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.raw)
        self.x = np.asarray(x[0], np.float64)

    def linear(self, name, x):
        """`x [time, in]` through the linear map of this name."""
        found = self.params
        for part in name.split("."):
            found = found[part]
        return np.einsum("ti,i...->t...", x, found["weight"]) + found.get("bias", 0)

    def output(self, y):
        """`y [time, ...]` through the output map."""
        found = self.params["output"]
        return y.reshape(len(y), -1) @ found["weight"].reshape(-1, WIDTH) + found.get("bias", 0)

    def assert_equal(self, want, got=None):
        """That the output, or what is `got`, is what was wanted to float32's precision."""
        got = self.y if got is None else got
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max(), rtol=3e-5)


@pytest.fixture(scope="session")
def bold(drawn):
    """``bold(built, scale=0.3)`` → parameters of a model or a part, moved so that each of them matters."""
    return lambda built, scale=0.3: drawn(built, scale)


@pytest.fixture
def build_mixer(drawn):
    """``build_mixer(spec, layer=0, layers=1, params=None)`` → `BuiltMixer`."""
    return partial(BuiltMixer, drawn)


@pytest.fixture
def cache_shapes():
    """``cache_shapes(spec, length)`` → shape and dtype of what a mixer keeps for two rows of this length."""

    def shapes(spec, length):
        module = Blueprint(lambda: spec.build(WIDTH, Initialization()))
        empty = jax.tree.map(lambda declared: None, module.declarations)
        return jax.eval_shape(lambda: module(empty).init_cache(2, length, "bfloat16"))

    return shapes
