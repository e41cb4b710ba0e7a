"""The commands and the keys of docs/observability.md."""

import re
from pathlib import Path

from efficient_lm.training.clock import PHASES
from efficient_lm.training.goodput import goodput
from efficient_lm.training.memory import memory_figures

PAGE = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()


def keys(rows):
    return {key for row in rows for key in re.findall(r"`([a-z_]+)[`/]", row[0])}


def test_commands_are_understood(shown_command, understood):
    assert understood(shown_command)


def test_every_key_of_goodput_is_in_a_table(table):
    seconds = dict.fromkeys(PHASES, 1.0)
    rows = [{"session": 1, "time": 0.0, "step": step, "event": event, "seconds": seconds}
            for step, event in ((0, "start"), (1, "end"))]  # fmt: skip
    assert keys(table(PAGE, "lost_steps")) == set(goodput(rows))


def test_measured_keys_of_a_row_are_in_a_table(table):
    measured = {"tokens_per_second", "mfu", "step_seconds", "data_wait", "dispatch", "metrics_wait", "compile_seconds"}
    assert measured | set(memory_figures()) <= keys(table(PAGE, "metrics_wait"))
