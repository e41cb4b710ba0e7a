"""Two models' distributions, compared at every place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.evaluation.distributions import acceptance, compared, divergence, overlap
from efficient_lm.models.language_model import ModelSpec

BLOCK = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 16}}


@pytest.fixture(scope="module")
def pair():
    model = ModelSpec(width=16, vocab_size=11, blocks={"layer": BLOCK}, layout=["layer"]).build()
    return [(model, jax.tree.map(lambda leaf: leaf * 3, model.init(jax.random.key(seed)))) for seed in (0, 1)]


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(1, 11, (3, 8), dtype=np.int32)
    weights = np.ones((3, 8), np.float32)
    weights[1, 3:] = 0
    places = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))
    return {"tokens": tokens, "weights": weights, "positions": places, "segment_ids": np.ones((3, 8), np.int32)}


def test_sums_are_those_of_whole_logits(pair, batch):
    p, q = (np.asarray(jax.nn.softmax(model.logits(params, batch["tokens"]))) for model, params in pair)
    shared = np.minimum(p, q).sum(-1)[batch["weights"] > 0].mean()
    assert acceptance(*pair, batch) == pytest.approx(shared, rel=1e-5) and shared < 0.99
    apart = (p * np.log(p / q)).sum(-1)[batch["weights"] > 0].sum()
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    assert float(compared(*pair, arrays, divergence, jnp.float32)) == pytest.approx(apart, rel=1e-4)


def test_a_model_accepts_all_of_its_own(pair, batch):
    assert acceptance(pair[0], pair[0], batch) == pytest.approx(1, abs=1e-5)


def test_distributions_that_share_nothing():
    p, q = jnp.log(jnp.array([1.0, 0, 0])), jnp.log(jnp.array([0, 0.5, 0.5]))
    assert float(overlap(p, q)) == 0 and float(overlap(q, q)) == 1
