"""A run's process under one of a scheduler: what it writes down, how it ends, and what is believed of its end."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from efficient_lm.errors import ResourceError
from efficient_lm.sweeps.launchers import remote
from efficient_lm.sweeps.launchers.base import UNKNOWN, Job
from efficient_lm.sweeps.launchers.remote import INTERRUPTED, Ending, Task, written


@pytest.fixture
def task(tmp_path):
    """``task(code)``: Python code as what a job runs."""

    def make(code, **environment):
        argv = [sys.executable, "-S", "-c", textwrap.dedent(code)]
        job = Job("one", argv, tmp_path, environment, None, tmp_path / "output.log")
        return Task.of(job, tmp_path / "made" / "status")

    return make


def test_the_exit_status_is_written_down_and_output_appended(task, tmp_path):
    (tmp_path / "output.log").write_text("before\n")
    made = task("import os, sys; print(os.environ['GREETING'], flush=True); sys.exit(5)", GREETING="hello")
    assert made.start().wait() == 5 == written(made.status)
    assert (tmp_path / "output.log").read_text() == "before\nhello\n"


def test_what_was_written_of_an_earlier_start_is_gone_once_it_starts_again(task):
    made = task("import sys; sys.stdin.read(); import time; time.sleep(60)")
    made.status.write_text("143\n")
    running = made.start()
    assert written(made.status) is None
    running.stop(signal.SIGKILL)
    assert running.wait() == 137 == written(made.status)


def test_other_processes_of_a_run_have_a_log_and_variables_of_their_own_and_no_status(task, tmp_path):
    made = task("import os; print(os.environ['INDEX'])")
    assert made.start(2, {"INDEX": "two"}).wait() == 0
    assert (tmp_path / "output.2.log").read_text() == "two\n"
    assert not made.status.exists() and not made.log.exists()


def test_it_does_not_hear_the_signal_that_is_the_schedulers(task, until, tmp_path):
    made = task("import time; print('here', flush=True); time.sleep(0.5)")
    running = made.start()
    until(lambda: made.log.read_text())
    running.stop(signal.SIGUSR2)
    assert running.wait() == 0


def test_it_ends_with_the_process_above_it(tmp_path, until):
    code = f"""
        import sys
        from pathlib import Path
        from efficient_lm.sweeps.launchers.remote import Task
        folder = Path({str(tmp_path)!r})
        child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        Task([sys.executable, "-S", "-c", child], {{}}, folder / "log", folder, folder / "status").start().wait()
    """
    above = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
    pid = int((tmp_path / "log").read_text())
    assert os.path.exists(f"/proc/{pid}")
    above.kill()
    above.wait()
    until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_disk_that_refuses_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    job = Job("one", ["true"], tmp_path, {}, None, tmp_path / "log")
    with pytest.raises(ResourceError, match=r"one: cannot write to .*file"):
        Task.of(job, tmp_path / "file" / "status")


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """``ending(assumed, patience)``: of a task that wrote nothing yet, looked at whenever it is asked."""
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.0)
    return lambda assumed, patience=0.0: Ending(tmp_path / "status", assumed, patience)


def test_what_a_task_wrote_goes_before_what_its_scheduler_says(ending, tmp_path):
    found = ending(lambda: None)
    assert found.poll() is None
    (tmp_path / "status").write_text("5\n")
    assert found.poll() == 5


def test_an_interrupted_task_may_be_queued_again(ending, tmp_path):
    said = [None, None, UNKNOWN]
    found = ending(lambda: said.pop(0))
    (tmp_path / "status").write_text(f"{INTERRUPTED}\n")
    assert [found.poll(), found.poll(), found.poll()] == [None, None, INTERRUPTED]
    (tmp_path / "status").unlink()
    assert found.poll() == INTERRUPTED


def test_a_file_that_comes_late_is_waited_for(ending, tmp_path):
    found = ending(lambda: UNKNOWN, patience=30.0)
    assert found.poll() is None
    (tmp_path / "status").write_text("3\n")
    assert found.poll() == 3


def test_one_that_never_comes_is_not(ending):
    said = [UNKNOWN, None, 6, 6, 6]
    found = ending(lambda: said.pop(0), patience=0.05)
    assert [found.poll(), found.poll(), found.poll()] == [None, None, None]
    time.sleep(0.1)
    assert found.poll() == 6


def test_files_are_not_looked_at_all_the_time(tmp_path):
    asked = []
    found = Ending(tmp_path / "status", lambda: asked.append(1))
    for _ in range(5):
        found.poll()
    assert len(asked) == 1
