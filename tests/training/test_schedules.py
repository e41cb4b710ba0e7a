"""Schedules against their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Spec
from efficient_lm.training.schedules import (
    ConstantSpec,
    CosineSpec,
    Duration,
    InverseSquareRootSpec,
    LinearSpec,
    PhasesSpec,
    WarmupStableDecaySpec,
    steps_of,
)
from efficient_lm.training.setup import prepare
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
    "inverse square root": (InverseSquareRootSpec(warmup=WARMUP), lambda s: math.sqrt(WARMUP / s)),
    "inverse square root in time": (
        InverseSquareRootSpec(warmup=WARMUP, timescale=0.2),
        lambda s: math.sqrt(20 / (20 + s - WARMUP)),
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


def phases(*given):
    return validate(PhasesSpec, {"kind": "phases", "phases": list(given)})


def rates(spec, steps=STEPS):
    return np.asarray(jax.vmap(spec.build(PEAK, steps))(jnp.arange(steps)))


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("name", CLOSED)
def test_one_phase_is_its_schedule(name):
    spec, _ = CLOSED[name]
    np.testing.assert_array_equal(rates(phases({"schedule": spec.dump()})), rates(spec))


def test_phases_go_on_where_the_one_before_ends():
    found = rates(
        phases(
            {"duration": 0.4, "schedule": {"kind": "cosine", "warmup": 10, "final": 0.5}},
            {"duration": 20, "schedule": {"kind": "constant", "warmup": 0}},
            {"schedule": {"kind": "linear", "warmup": 0, "final": 0.2}},
            {"duration": 10, "to": 0.4},
        )
    )
    wanted = [(s + 1) / 10 for s in range(10)] + [0.5 + 0.5 * cosine(s / 30) for s in range(30)] + [0.5] * 20
    wanted += [0.5 * (1 - 0.8 * s / 30) for s in range(30)] + [0.1 + 0.3 * s / 10 for s in range(10)]
    np.testing.assert_allclose(found, PEAK * np.array(wanted), rtol=3e-6)


def test_warm_restarts():
    """Cosines of 20, 40 and 40 steps, each from its peak at once; and one that rises to its peak again."""
    restart = {"kind": "cosine", "warmup": 0, "final": 0.0}
    found = rates(
        phases(
            {"duration": 20, "schedule": restart},
            {"duration": 0.4, "peak": 1.0, "schedule": restart},
            {"peak": 0.5, "schedule": {**restart, "warmup": 0.25, "final": 0.5}},
        )
    )
    wanted = [cosine(s / 20) for s in range(20)] + [cosine(s / 40) for s in range(40)]
    wanted += [0.5 * (s + 1) / 10 for s in range(10)] + [0.25 + 0.25 * cosine(s / 30) for s in range(30)]
    np.testing.assert_allclose(found, PEAK * np.array(wanted), rtol=3e-6, atol=1e-8)


def test_phases_of_phases_are_phases():
    inner = [{"duration": 30, "schedule": {"kind": "linear", "warmup": 5, "final": 0.5}}, {"to": 0.1}]
    last = {"duration": 40, "schedule": {"kind": "inverse_square_root", "warmup": 4}, "peak": 0.8}
    flat = phases(inner[0], {**inner[1], "duration": 30}, last)
    nested = phases({"schedule": {"kind": "phases", "phases": inner}}, last)
    np.testing.assert_allclose(rates(nested), rates(flat), rtol=1e-6)


def test_fractions_are_rounded_together():
    line = {"to": 0.5}
    assert phases(*({"duration": 0.25, **line} for _ in range(4))).lengths(10) == [2, 3, 3, 2]
    assert phases({"duration": 3, **line}, line, {"duration": 0.2, **line}).lengths(10) == [3, 5, 2]


LINE = {"duration": 60, "to": 0.5}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([LINE, {"duration": 50, "to": 0.0}], r"phases\[1\]\.duration: 50 steps, but the run has 100 steps, and .* 60"),
        ([LINE, {"duration": 30, "to": 0.0}], r"phases\[1\]\.duration: the phases take 90 steps, but the run has 100"),
        ([LINE, {"duration": 40, "to": 0.0}, {"to": 1.0}], r"phases\[2\]\.duration: null, .* phases take 100"),
        ([{"to": 0.1}, LINE, {"to": 0.2}], r"phases\[2\]\.duration: null, as in phase 0"),
        ([{"duration": 0, "to": 0.1}, LINE], r"phases\[0\]\.duration: 0 steps"),
        (
            [LINE, {"schedule": {"kind": "cosine", "warmup": 50}}],
            r"schedule\.phases\[1\]\.schedule\.warmup: 50 steps, but the phase has 40; at most 40",
        ),
        (
            [{"duration": 0.5, "to": 0.0}, {"schedule": {"kind": "constant"}}],
            r"phases\[1\]\.peak: the phase before ends at zero, and null stays there; set a share",
        ),
        ([{"duration": 0.5}], r"phases\.0: a phase has either a schedule, or the share 'to'"),
        ([{"to": 0.5, "peak": 1.0}], r"phases\.0: 'peak' is the one of a schedule"),
        ([{"schedule": {"kind": "cosinus"}}], r"unknown schedule kind 'cosinus'; did you mean 'cosine'"),
        ([], r"phases: "),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        phases(*given).spans(STEPS)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_a_falling_rate_beside_an_average_of_the_way_is_said(kind, caplog):
    keys = ["tokenizer=bytes", "train.sequence_length=16", "optimizer=schedule_free_sgd", f"schedule={kind}"]
    prepare(load_run_config(keys))
    said = "schedule: cosine lowers the learning rate of schedule_free_sgd"
    assert (said in caplog.text) == (kind == "cosine")
