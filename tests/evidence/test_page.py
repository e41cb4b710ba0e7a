"""What a page says came true, and of how many seeds."""

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.evidence.page import page, verdicts
from efficient_lm.evidence.spec import EvidenceSpec
from efficient_lm.validation import validate


def evidence(*expect, **values):
    given = {"question": "Which?", "arms": {"one": [], "other": []}, "expect": list(expect), **values}
    return validate(EvidenceSpec, given, "test")


def row(arm, *figures, **point):
    runs = [{"seed": seed, "steps": 3, "parameters": 5, "seconds": 7, "figures": each} for seed, each in figures]
    return {"arm": arm, **point, "learning_rate": 1e-3, "tried": runs[:1], "runs": [*runs, {"seed": 9, "error": "no"}]}


def test_the_mean_decides():
    expect = [
        {"arm": "one", "figure": "accuracy", "at_least": 0.9},
        {"arm": "one", "figure": "length 8", "at_least": 0.1, "at_most": 0.4},
        {"arm": "one", "figure": "length 9", "at_least": 0.1},
    ]
    found = row("one", (0, {"accuracy": 0.8, "length 8": 0.4}), (1, {"accuracy": 1.0, "length 8": 0.5}), w=3)
    first, second, third = verdicts(evidence(*expect, grid={"w": [3]}), [found])
    assert first == (
        "- one, w=3, accuracy: at least 0.9 expected, 0.900 (0.800 to 1.000) measured: as expected (in 1 of 2 seeds)."
    )
    assert third == "- one, w=3, length 9: at least 0.1 expected, and not measured."
    assert second.endswith("measured: not reproduced at this scale (in 1 of 2 seeds).")


def test_arms_are_compared_seed_by_seed():
    rows = [row("one", (0, {"a": 1.0}), (1, {"a": 6.0})), row("other", (1, {"a": 3.0}), (0, {"a": 2.0}))]
    over, minus = {"arm": "one", "figure": "a", "over": "other"}, {"arm": "one", "figure": "a", "minus": "other"}
    ratio, difference = verdicts(evidence({**over, "at_most": 1.3}, {**minus, "at_least": 0}), rows)
    assert ratio.startswith("- one, a over that of other: at most 1.3 expected, 1.250 (0.500 to 2.000) measured: as")
    assert difference.startswith("- one, a minus that of other: at least 0 expected, 1.000 (-1.000 to 3.000) measured")
    (alone,) = verdicts(evidence({**over, "at_most": 1.3}), rows[:1])
    assert alone == "- one, a over that of other: at most 1.3 expected, and not measured."
    with pytest.raises(ConfigError, match="over, minus: one of the two"):
        evidence({**over, "minus": "other"})


def test_figures_that_an_arm_lacks_stay_empty():
    facts = {"date": "2026-01-01T00:00", "cpu": "c", "device": "d", "versions": {}}
    rows = [row("one", (0, {"a": 1.0})), row("other", (0, {"b": 2.0}))]
    text = page("Title", "name", evidence(), rows, facts, "name.png")
    assert "| one | 5 | 0.001 | 3 | 1.000 |  | 7 |" in text and "| other | 5 | 0.001 | 3 |  | 2.000 | 7 |" in text
    assert text.startswith("# Title\n") and text.endswith("![Title](name.png)\n")
