"""Runs of IsoFLOP profiles: every size at every budget."""

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.isoflop import IsoflopSpec, isoflop
from efficient_lm.validation import validate

SMALL = ["mixer=gla", "train.sequence_length=64", "train.batch_size=4", "model.repeats=2"]


def spec(**given):
    return validate(IsoflopSpec, given, "isoflop")


def test_every_size_has_every_budget(composed):
    found = isoflop(composed(*SMALL), spec(flops=[1e12, 2.5e11], params=[1e5, 3e5]), "gla")
    assert list(found) == ["C2.5e11-N1e5", "C2.5e11-N3e5", "C1e12-N1e5", "C1e12-N3e5"]
    for label, fitted in found.items():
        columns, size = fitted.columns, float(label.partition("-N")[2])
        assert columns["parameters"] == pytest.approx(size, rel=0.02)
        assert columns["training_flops"] == pytest.approx(columns["budget_flops"], rel=0.02)
    assert found["C1e12-N1e5"].columns["steps"] > 3 * found["C2.5e11-N1e5"].columns["steps"]


def test_sizes_by_tokens_per_parameter_grow_with_the_budget(composed):
    found = isoflop(composed(*SMALL), spec(flops=[1e11, 1e12], tokens_per_parameter=[5, 40]))
    assert list(found) == ["C1e11-D5N", "C1e11-D40N", "C1e12-D5N", "C1e12-D40N"]
    sizes = [fitted.columns["parameters"] for fitted in found.values()]
    assert sizes[0] > sizes[1] < sizes[2] > sizes[3] and sizes[2] > 2 * sizes[0]
    for label, fitted in found.items():
        ratio = fitted.columns["tokens"] / fitted.columns["parameters"]
        assert ratio == pytest.approx(float(label.partition("-D")[2].rstrip("N")), rel=0.02)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"flops": [1e12]}, "isoflop: say how large models are"),
        ({"flops": [1e12], "params": [1e5], "tokens_per_parameter": [20]}, "isoflop: say how large models are"),
        ({"flops": [1e12, 1e12], "params": [1e5]}, "isoflop.flops: lists a number twice"),
        ({"flops": [], "params": [1e5]}, "isoflop.flops: expected at least 1 item"),
    ],
)
def test_what_does_not_say_the_runs(given, words):
    with pytest.raises(ConfigError, match=words):
        spec(**given)


def test_runs_that_cannot_be_had_are_named(composed):
    with pytest.raises(ConfigError, match=r"(?s)gla-C1e8-N1e5: budget.flops.*\ngla-C1e8-N3e5: budget.flops"):
        isoflop(composed(*SMALL), spec(flops=[1e8], params=[1e5, 3e5]), "gla")
