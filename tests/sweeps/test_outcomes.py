"""What became of a run, and rows of metrics as they come."""

import fcntl
import json
import os
import signal

import pytest

from efficient_lm.sweeps.launchers.base import UNKNOWN
from efficient_lm.sweeps.outcomes import Tail, in_use, last_error, outcome, saved_step, status_name

STOPPED, WHOLE = {"step": 3, "stopped_by": "SIGTERM"}, {"step": 9, "val_loss": 2.0, "run": "x"}


@pytest.mark.parametrize(
    ("status", "summary", "kind"),
    [
        (0, WHOLE, "complete"),
        (UNKNOWN, WHOLE, "complete"),
        (0, {"step": 3, "stopped_by": "train.minutes"}, "complete"),
        (UNKNOWN, STOPPED, "stopped"),
        (UNKNOWN, None, "stopped"),
        (143, STOPPED, "stopped"),
        (-9, None, "stopped"),
        (137, None, "stopped"),
        (6, None, "stopped"),
        (0, None, "failed"),
        (2, None, "failed"),
        (4, None, "failed"),
        (5, STOPPED, "failed"),
        (1, None, "failed"),
    ],
)
def test_what_became_of_a_run(tmp_path, status, summary, kind):
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = outcome(tmp_path, status, tmp_path / "log")
    assert found.kind == kind and found.figures.get("step") == (summary or {}).get("step")


def test_statuses_have_names():
    assert [status_name(status) for status in (2, 3, 4, 5, 6, -9, 143, 77)] == [
        "config", "data", "checkpoint", "diverged", "resources", "SIGKILL", "SIGTERM", "exit status 77",
    ]  # fmt: skip


def test_the_reason_is_the_last_fault_of_the_log(tmp_path):
    log = tmp_path / "log"
    assert last_error(log) == ""
    log.write_text("x" * 100_000 + "\nerror: first\nerror: second\nTraceback\n\n")
    assert last_error(log) == "second"
    log.write_text("Traceback (most recent call last):\n  File\nKeyError: 'inner'\n")
    assert last_error(log) == "KeyError: 'inner'"
    assert outcome(tmp_path, 1, log).reason == "exit status 1: KeyError: 'inner'"


def test_a_locked_run_directory_is_in_use(tmp_path):
    assert not in_use(tmp_path)
    lock = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    assert not in_use(tmp_path)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert in_use(tmp_path) and outcome(tmp_path, 4, tmp_path / "log").kind == "stopped"
    os.close(lock)


def test_the_newest_checkpoint(tmp_path):
    assert saved_step(tmp_path) == 0
    for name in ("5", "20", "20.tmp", "aside"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_step(tmp_path) == 20


def test_rows_are_given_once_whole_and_again_when_the_file_is_new(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", Tail(tmp_path)
    assert tail.rows() == []
    path.write_text('{"step": 1}\nnonsense\n[2]\n{"step": 2}\n{"st')
    assert tail.rows() == [{"step": 1}, {"step": 2}] and tail.rows() == []
    with open(path, "a") as file:
        file.write('ep": 3}\n')
    assert tail.rows() == [{"step": 3}]
    (tmp_path / "new").write_text('{"step": 1}\n')
    os.replace(tmp_path / "new", path)
    assert tail.rows() == [{"step": 1}]


def test_signals_have_numbers_of_their_own():
    assert status_name(-signal.SIGSEGV) == "SIGSEGV" and status_name(UNKNOWN) == "ended unseen"
