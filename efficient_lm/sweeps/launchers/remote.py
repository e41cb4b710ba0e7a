"""The process of a run on a machine that a scheduler chose, under a process of that scheduler. Imports no jax."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from efficient_lm.errors import ResourceError, storage_fault
from efficient_lm.sweeps.launchers.base import Job

INTERRUPTED = 128 + signal.SIGTERM
KILLED = 128 + signal.SIGKILL
PATIENCE = 15.0
"""Seconds in which a file that another machine wrote may still appear."""
LOOK_EVERY = 1.0
"""Seconds between two looks at a file that may lie on a file server."""

# The run ends with the process that started it, however that ends (on Linux), and leaves SIGUSR2 to it: schedulers
# send signals to all processes of a job.
_LEASH = """
import ctypes, os, signal, sys
library = ctypes.CDLL(None)
if hasattr(library, "prctl"):
    library.prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Task:
    """What is to be run, as plain data that a scheduler carries to another machine of the same file system.

    Attributes:
        argv, environment, log: as of `Job`.
        folder: where the sweep was started; relative paths begin there.
        status: file that gets the exit status, if the process comes to an end while the one above it lives.
    """

    argv: list[str]
    environment: dict[str, str]
    log: Path
    folder: Path
    status: Path

    @classmethod
    def of(cls, job: Job, status: Path) -> "Task":
        """The task of a job. Raises `ResourceError` where the folder of `status` cannot be made."""
        try:
            status.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = storage_fault(error) or error.strerror
            raise ResourceError(f"{job.name}: cannot write to {status.parent}: {reason}") from error
        return cls(job.argv, job.environment, job.log.absolute(), Path.cwd(), status.absolute())

    def start(self, index: int = 0, environment: Mapping[str, str] | None = None) -> "Running":
        """Start process `index` of the run; those but the first write to a log of their own."""
        log = self.log if index == 0 else self.log.with_name(f"{self.log.stem}.{index}{self.log.suffix}")
        if index == 0:
            self.status.unlink(missing_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _LEASH, str(os.getpid()), *self.argv],
                cwd=self.folder,
                env=os.environ | self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return Running(process, self.status if index == 0 else None)


class Running:
    """A process of a task, in the process that started it."""

    def __init__(self, process: subprocess.Popen, status: Path | None):
        self._process, self._status = process, status

    def wait(self) -> int:
        """Wait for the end, and write down the exit status; 128 + a signal's number if one ended it."""
        self.ended()
        code = self._process.wait()
        return self.finish(code if code >= 0 else 128 - code)

    def ended(self) -> None:
        """Wait for the end alone; may be called while `wait` waits, from a signal's handler or another thread."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def finish(self, code: int) -> int:
        """Write an exit status down, whole or not at all."""
        if self._status is not None:
            half = self._status.with_suffix(".half")
            half.write_text(f"{code}\n")
            half.replace(self._status)
        return code

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self._process.send_signal(number)


class Ending:
    """The exit status of a task elsewhere: what it wrote down, or what its scheduler says of its end.

    Args:
        status: the file.
        assumed: of a task that its scheduler has nothing more to do with, the exit status it has unless it wrote one
            down itself; None while it waits, runs, or may be queued again.
        patience: seconds in which the file may still appear after the end.
    """

    def __init__(self, status: Path, assumed: Callable[[], int | None], patience: float = PATIENCE):
        self.patience = patience
        self._status, self._assumed = status, assumed
        self._code: int | None = None
        self._looked_at, self._over_at = float("-inf"), float("inf")

    def poll(self) -> int | None:
        """The exit status once it is known that it will not change, None before."""
        now = time.monotonic()
        if self._code is None and now - self._looked_at >= LOOK_EVERY:
            self._looked_at = now
            self._code = self._find_out(now)
        return self._code

    def _find_out(self, now: float) -> int | None:
        code = written(self._status)
        # A scheduler may queue what it interrupted once more by itself; all others are through.
        if code is not None and code != INTERRUPTED:
            return code
        assumed = self._assumed()
        self._over_at = float("inf") if assumed is None else min(self._over_at, now)
        if assumed is None or code is not None:
            return None if assumed is None else code
        return assumed if now - self._over_at >= self.patience else None


def written(status: Path) -> int | None:
    """The exit status in a file, None if there is none."""
    try:
        return int(status.read_text())
    except (OSError, ValueError):
        return None
