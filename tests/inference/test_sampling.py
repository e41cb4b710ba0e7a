"""Sampling: what each filter leaves, and that draws follow the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.inference.sampling import SamplingSpec, filter_logits, sample

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))[None]


def left(**options):
    spec = SamplingSpec(**{"temperature": 1.0, **options})
    return np.flatnonzero(np.isfinite(filter_logits(LOGITS, spec)[0])).tolist()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 5), ({"top_k": 2}, 2), ({"top_k": 9}, 5), ({"top_p": 0.5}, 1), ({"top_p": 0.6}, 2), ({"top_p": 0.9}, 3),
        ({"top_p": 1.0}, 5), ({"top_p": 0.0}, 1), ({"min_p": 0.3}, 3), ({"min_p": 1.0}, 1),
        ({"top_k": 3, "min_p": 0.4}, 2),
    ],
)  # fmt: skip
def test_filters_keep_the_likeliest(options, kept):
    assert left(**options) == list(range(kept))


def test_temperature_comes_before_the_nucleus():
    assert left(top_p=0.9, temperature=0.25) == [0]


def test_draws_follow_the_filtered_distribution():
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(sample(jnp.tile(LOGITS, (20_000, 1)), keys, SamplingSpec(temperature=1.0, top_k=3)))
    share = np.bincount(drawn, minlength=5) / drawn.size
    np.testing.assert_allclose(share, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0], atol=0.015)


def test_zero_temperature_takes_the_likeliest():
    assert sample(LOGITS, jax.random.split(jax.random.key(0), 1), SamplingSpec(temperature=0.0)).tolist() == [0]
