"""Sweeps that are killed, shared, stopped and begun again end like undisturbed ones."""

import contextlib
import os
import random
import secrets
import signal
import sqlite3
import time

import pytest

AXES = ["loss=3,2,4", "+x=1,2", "steps=20", "seconds=0.02", "restarts=1000", "launcher.concurrent=2"]


def running(folder):
    """Numbers of the stub runs that are alive."""
    found = []
    for path in folder.glob("runs/*/pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if b"stub_train" in open(f"/proc/{pid}/cmdline", "rb").read():
                found.append(pid)
    return found


def starts(folder):
    return {path.parent.name: len(path.read_text().splitlines()) for path in folder.glob("runs/*/starts")}


def test_sweeps_and_runs_killed_twenty_times_end_like_an_undisturbed_one(nursery, table, tmp_path):
    seed = int(os.environ.get("FAULT_SEED", secrets.randbelow(1 << 32)))
    print(f"FAULT_SEED={seed}")
    draw, log = random.Random(seed), tmp_path / "log"
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert nursery.wait(nursery.start(log, f"dir={whole}", *AXES)) == 0
    kills, pid = 0, None
    while kills < 20:
        pid = pid or nursery.start(log, f"dir={folder}", *AXES)
        time.sleep(draw.uniform(0, 0.4))
        runs = running(folder)
        if draw.random() < 0.5 and runs:
            os.kill(draw.choice(runs), signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = nursery.wait(pid)
            assert status in (0, -signal.SIGKILL), log.read_text()
            if status == 0:
                (folder / "study.db").unlink()  # It was through before twenty: once more from the beginning.
                for path in folder.glob("runs/*/summary.json"):
                    path.unlink()
            pid = None
        kills += 1
    assert nursery.wait(pid or nursery.start(log, f"dir={folder}", *AXES)) == 0, log.read_text()
    assert table(folder) == table(whole)
    assert running(folder) == []


def test_runs_outlive_a_killed_sweep_and_are_found_again(nursery, table, until, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [f"dir={folder}", "loss=3,2", "steps=100", "seconds=0.02", "launcher.concurrent=2"]
    pid = nursery.start(log, *overrides)
    until(lambda: len(running(folder)) == 2)
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    nursery.wait(pid)
    runs = running(folder)
    assert len(runs) == 2
    assert nursery.wait(nursery.start(log, *overrides)) == 0
    assert [row["state"] for row in table(folder)] == ["finished"] * 2
    assert set(starts(folder).values()) == {1} and "still running" in log.read_text()


def test_two_processes_share_a_sweep(nursery, table, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [f"dir={folder}", "loss=range(0,12)", "steps=10", "seconds=0.02"]
    pids = [nursery.start(log, *overrides) for _ in range(2)]
    assert [nursery.wait(pid) for pid in pids] == [0, 0]
    assert [row["state"] for row in table(folder)] == ["finished"] * 12
    assert set(starts(folder).values()) == {1} and len(starts(folder)) == 12


def test_one_process_takes_over_from_another_that_dies(nursery, table, until, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [f"dir={folder}", "loss=range(0,6)", "steps=10", "seconds=0.05"]
    pids = [nursery.start(log, *overrides) for _ in range(2)]
    until(lambda: len(running(folder)) == 2)
    os.kill(pids[0], signal.SIGKILL)
    assert [nursery.wait(pid) for pid in pids] == [-signal.SIGKILL, 0]
    assert [row["state"] for row in table(folder)] == ["finished"] * 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_asks_runs_to_save_and_the_same_command_goes_on(nursery, table, until, tmp_path, number):
    folder, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [f"dir={folder}", "loss=3,2", "steps=40", "seconds=0.02"]
    pid = nursery.start(log, *overrides)
    until(lambda: list(folder.glob("runs/loss_3/checkpoints/2")))
    os.kill(pid, number)
    assert nursery.wait(pid) == 128 + number and running(folder) == []
    assert [row["state"] for row in table(folder)] == ["interrupted", "waiting"]
    saved = len(list(folder.glob("runs/loss_3/checkpoints/*")))
    assert 2 <= saved < 40
    assert nursery.wait(nursery.start(log, *overrides)) == 0
    assert [row["state"] for row in table(folder)] == ["finished", "finished"]
    assert starts(folder) == {"loss_3": 2, "loss_2": 1}


def test_a_run_that_is_killed_goes_on_and_one_that_is_killed_each_time_fails(sweep, tmp_path):
    rows = {row.name: row for row in sweep("kill=0,2,9", "restarts=2").rows}
    assert {name: row.state for name, row in rows.items()} == {
        "kill_0": "finished", "kill_2": "finished", "kill_9": "failed",
    }  # fmt: skip
    assert starts(tmp_path / "sweep") == {"kill_0": 1, "kill_2": 3, "kill_9": 3}
    assert rows["kill_9"].reason == "SIGKILL, 3 times without a step saved in between"


def test_failed_runs_are_listed_and_tried_again_when_told(sweep, tmp_path):
    overrides = ("loss=2,3", "when=[{if: {loss: 3}, base: ['+fail=5']}]")
    assert [(row.state, row.reason) for row in sweep(*overrides).rows] == [
        ("finished", ""), ("failed", "diverged: the loss was not a number"),
    ]  # fmt: skip
    assert sweep(*overrides).rows[1].state == "failed"
    (tmp_path / "sweep" / "fixed").touch()
    assert [row.state for row in sweep(*overrides, "retry_failed=true").rows] == ["finished"] * 2
    assert starts(tmp_path / "sweep") == {"loss_2": 1, "loss_3": 2}


def test_an_abandoned_claim_goes_to_one_process(stubbed, tmp_path):
    from efficient_lm.sweeps.launchers.local import reference_of
    from efficient_lm.sweeps.study import Study

    folder = tmp_path / "sweep"
    folder.mkdir()
    first, second = (Study.open(folder, {"a": 1}, ["minimize"]) for _ in range(2))
    second._owner = reference_of(os.getppid())
    assert (first.claim("arm"), second.claim("arm")) == ("", None)
    first.note("arm", "its run")
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("UPDATE claims SET owner = replace(owner, ?, ?)", (str(os.getpid()), "999999999"))
    assert (second.claim("arm"), first.claim("arm")) == ("its run", None)
    second.release("arm")
    assert first.claim("arm") == ""
    first.close()
    second.close()
