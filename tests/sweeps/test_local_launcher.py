"""Runs as processes of this machine."""

import os
import signal
import socket
import sys
import time

import psutil
import pytest

from efficient_lm.errors import ResourceError
from efficient_lm.sweeps.launchers.base import UNKNOWN, Job
from efficient_lm.sweeps.launchers.local import LocalLauncherSpec, available_memory

WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep(60)
"""
SHOWS = """
import os, time
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], flush=True)
time.sleep(60)
"""


@pytest.fixture
def job(tmp_path):
    def make(code=WAITS, memory=None, **environment):
        return Job("job", [sys.executable, "-S", "-c", code], tmp_path, environment, memory, tmp_path / "log")

    return make


def test_a_process_its_log_its_variables_and_its_status(job, until, tmp_path):
    launcher = LocalLauncherSpec().build()
    handle = launcher.submit(
        job("import os, sys; print(os.environ['A'], os.getpgid(0) == os.getpid()); sys.exit(3)", A="b")
    )
    assert until(handle.poll) == 3 and (tmp_path / "log").read_text() == "b True\n"


def test_cancelling_asks_first_and_kills_then(job, until, tmp_path):
    launcher = LocalLauncherSpec(concurrent=2).build()
    handle = launcher.submit(job())
    until(lambda: (tmp_path / "log").read_text() == "up\n")
    assert handle.poll() is None
    handle.cancel()
    assert until(handle.poll) == 7
    handle.cancel()
    stubborn = launcher.submit(job(WAITS.replace("sys.exit(7)", "None")))
    until(lambda: (tmp_path / "log").read_text() == "up\nup\n")
    stubborn.cancel()
    time.sleep(0.05)
    assert stubborn.poll() is None
    stubborn.cancel()
    assert until(stubborn.poll) == -signal.SIGKILL


def test_only_so_many_run_at_once_and_only_what_fits(job, until):
    launcher = LocalLauncherSpec(concurrent=2, memory=100).build()
    large = launcher.submit(job(memory=70))
    assert launcher.room(job(memory=30)) and not launcher.room(job(memory=40))
    small = launcher.submit(job(memory=20))
    assert not launcher.room(job(memory=5))
    for handle in (large, small):
        handle.cancel()
        handle.cancel()
        until(lambda handle=handle: handle.poll() is not None)
    # Alone, a run is given what there is: what does not fit at all was refused before.
    assert launcher.room(job(memory=500))


def test_gpus_are_shared_out(job, until, tmp_path):
    launcher = LocalLauncherSpec(concurrent=4, gpus=[0, 3], memory=None).build()
    handles = [launcher.submit(job(SHOWS)) for _ in range(4)]
    assert not launcher.room(job())
    until(lambda: (tmp_path / "log").read_text().count("\n") == 4)
    assert sorted((tmp_path / "log").read_text().split("\n")[:4]) == ["0 false", "0 false", "3 false", "3 false"]
    for handle in handles:
        handle.cancel()
        until(lambda handle=handle: handle.poll() is not None)


def test_a_run_is_found_again_by_its_reference(job, until):
    first, second = LocalLauncherSpec().build(), LocalLauncherSpec().build()
    handle = first.submit(job())
    found = second.attach(job(), handle.reference)
    assert found.poll() is None and not second.room(job())
    found.cancel()
    found.cancel()
    until(lambda: found.poll() == UNKNOWN)
    assert handle.poll() in (7, -signal.SIGKILL, -signal.SIGTERM)
    assert second.attach(job(), handle.reference) is None
    for other in ("", "elsewhere 1 1.0", f"{socket.gethostname()} {os.getpid()} 12.5", "x"):
        assert second.attach(job(), other) is None


def test_what_cannot_be_started_says_so(tmp_path):
    launcher = LocalLauncherSpec().build()
    with pytest.raises(ResourceError, match="job: cannot be started: No such file"):
        launcher.submit(Job("job", ["/nowhere/python"], tmp_path, {}, None, tmp_path / "log"))


def test_memory_that_is_free_is_at_most_what_there_is():
    assert 0 < available_memory() <= psutil.virtual_memory().total
    launcher = LocalLauncherSpec().build()
    launcher.measured(123)
    assert launcher.limit_bytes == 123 and LocalLauncherSpec(memory=None).build().limit_bytes is None
