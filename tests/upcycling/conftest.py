"""A small dense model whose layers differ, and rows of text for it."""

from functools import partial

import jax
import numpy as np
import pytest

from efficient_lm.models.language_model import ModelSpec

WIDTH, VOCAB, TIME = 16, 31, 12


class Made:
    """A model with parameters, and its logits on two rows."""

    def __init__(self, drawn, spec, params=None):
        self.spec = ModelSpec.model_validate(spec) if isinstance(spec, dict) else spec
        self.model = self.spec.build()
        self.params = drawn(self.model, 0.3) if params is None else params

    def logits(self):
        tokens = jax.random.randint(jax.random.key(3), (2, TIME), 0, VOCAB)
        return np.asarray(jax.jit(self.model.logits)(self.params, tokens))


def dense(ffn, layers=3, **options):
    blocks = {"layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": ffn}}
    return {"width": WIDTH, "vocab_size": VOCAB, "blocks": blocks, "layout": ["layer"], "repeats": layers, **options}


@pytest.fixture(scope="session")
def made(drawn):
    """``made(spec, params=None)`` → `Made`."""
    return partial(Made, drawn)


@pytest.fixture(scope="session")
def dense_spec():
    """``dense_spec(ffn, layers=3, **options)`` → values of a spec."""
    return dense


@pytest.fixture(scope="session")
def rows():
    """``rows(count, low, high, seed=0)`` → rows of ids from `low` up to `high`, the last one half padding."""

    def make(count, low, high, seed=0):
        tokens = np.random.default_rng(seed).integers(low, high, (count, TIME)).astype(np.int32)
        segments = np.ones((count, TIME), np.int32)
        segments[-1, TIME // 2 :] = 0
        positions = np.tile(np.arange(TIME, dtype=np.int32), (count, 1))
        return {"tokens": tokens, "segment_ids": segments, "positions": positions}

    return make
