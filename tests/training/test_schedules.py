"""Schedules against their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Spec
from efficient_lm.training.schedules import (
    ConstantSpec,
    CosineSpec,
    Duration,
    LinearSpec,
    WarmupStableDecaySpec,
    steps_of,
)
from efficient_lm.validation import validate

PEAK, STEPS, WARMUP = 0.25, 100, 10


def after_warmup(step):
    return (step - WARMUP) / (STEPS - WARMUP)


CLOSED = {
    "cosine": (CosineSpec(warmup=WARMUP, final=0.1), lambda s: 0.1 + 0.45 * (1 + math.cos(math.pi * after_warmup(s)))),
    "linear": (LinearSpec(warmup=0.1, final=0.2), lambda s: 1 - 0.8 * after_warmup(s)),
    "constant": (ConstantSpec(warmup=WARMUP), lambda s: 1.0),
    "linear decay": (
        WarmupStableDecaySpec(warmup=WARMUP, decay=0.2, shape="linear"),
        lambda s: min(1.0, 1 - (s - 80) / 20),
    ),
    "one minus root": (
        WarmupStableDecaySpec(warmup=WARMUP, decay=20, final=0.5),
        lambda s: 1 - 0.5 * math.sqrt(max(s - 80, 0) / 20),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_whole_run(name):
    spec, factor = CLOSED[name]
    rate = spec.build(PEAK, STEPS)
    found = jax.vmap(rate)(jnp.arange(STEPS))
    wanted = [PEAK * ((step + 1) / WARMUP if step < WARMUP else factor(step)) for step in range(STEPS)]
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert found.dtype == jnp.float32 and float(rate(3)) == float(found[3])
    assert float(found.min()) > 0 and float(found.max()) == pytest.approx(PEAK)


def test_no_warmup_begins_at_the_peak():
    assert float(LinearSpec(warmup=0).build(PEAK, STEPS)(0)) == pytest.approx(PEAK)


def test_all_warmup_never_decays():
    rate = CosineSpec(warmup=STEPS).build(PEAK, STEPS)
    assert float(rate(STEPS - 1)) == pytest.approx(PEAK)


class Holder(Spec):
    lasts: Duration


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (1, 1), (7, 7), (20.0, 20), (0.25, 50), (0.0, 0)])
def test_durations_are_steps_or_fractions(given, steps):
    assert steps_of(validate(Holder, {"lasts": given}).lasts, 200) == steps


@pytest.mark.parametrize("given", [-1, 1.5, 1.0, "10", True, None, float("nan")])
def test_other_durations_are_refused(given):
    with pytest.raises(ConfigError, match="lasts: expected a whole number of steps, or a fraction of the run below 1"):
        validate(Holder, {"lasts": given})


def test_spans_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.warmup: 101 steps, but the run has 100; at most 100"):
        CosineSpec(warmup=101).build(PEAK, STEPS)
    with pytest.raises(ConfigError, match=r"schedule\.decay: 95 steps after 10 of warmup, .* at most 90"):
        WarmupStableDecaySpec(warmup=10, decay=95).build(PEAK, STEPS)
