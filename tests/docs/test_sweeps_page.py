"""The commands of docs/sweeps.md and docs/budgets.md, and the keys that a sweep has."""

from pathlib import Path

from efficient_lm.sweeps.config import SweepConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join((DOCS / name).read_text() for name in ("sweeps.md", "budgets.md"))


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def test_every_key_is_named():
    missing = [key for key in SweepConfig.keys() if not any(f"{mark}{key}" in PAGE for mark in ("`", " ", "("))]
    assert not missing
