"""The commands of docs/reports.md, and the names in its tables."""

import re
from pathlib import Path

from efficient_lm.sweeps.report.write import DRAWN, PARTS

PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command).named


def test_every_picture_is_in_the_table(table):
    (names,) = [row[0] for row in table(PAGE, "runs.csv") if "_*.png" in row[0]]
    said = set(re.findall(r"`(\w+)_\*\.png`", names))
    assert said == {name.split("_")[0] for name in DRAWN}


def test_every_part_of_the_page_is_in_the_table():
    rows = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    assert set(PARTS.values()) <= set(rows)
