"""The page about plans: its commands compose, and its table has every key."""

from pathlib import Path

from efficient_lm.config import PlanConfig

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()


def test_a_shown_command_is_understood(shown_command, understood):
    assert understood(shown_command)


def test_every_key_is_explained(table):
    assert {row[0].strip("`") for row in table(PAGE, "target")} == set(PlanConfig.model_fields)
