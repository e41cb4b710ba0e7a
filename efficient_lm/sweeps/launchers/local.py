"""Runs as processes of this machine, so many at once, within its memory."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from efficient_lm.errors import ResourceError, storage_fault
from efficient_lm.spec import Listing, Natural, Positive
from efficient_lm.sweeps.launchers.base import UNKNOWN, Handle, Job, Launcher, LauncherSpec

CGROUP = Path("/sys/fs/cgroup")
CLOCK_SECONDS = 2.0
"""By which the clock may be set while a run is alive: its birth is told by the clock."""


class LocalLauncherSpec(LauncherSpec):
    """Processes of this machine.

    Attributes:
        memory: bytes that runs may have together; ``auto``: what is free when the sweep starts, of an accelerator where
            there is one; None: nobody counts, and nothing is compiled to find out.
        gpus: numbers of the GPUs that runs are divided among, each run seeing one; none: every run sees what there is.
    """

    kind: Literal["local"] = "local"
    memory: Literal["auto"] | Positive | None = "auto"
    gpus: Listing[Natural] = ()

    @property
    def counts_memory(self) -> bool:
        return self.memory is not None

    def build(self) -> Launcher:
        return LocalLauncher(self.concurrent, self.memory, self.gpus)


@dataclass
class _Slot:
    """A device, or the machine, and the runs on it."""

    gpu: int | None
    most: int
    running: list[tuple[Job, Handle]] = field(default_factory=list)

    def takes(self, job: Job, limit: float | None) -> bool:
        self.running = [(other, handle) for other, handle in self.running if handle.poll() is None]
        if len(self.running) >= self.most:
            return False
        wanted = (job.memory_bytes or 0) + sum(other.memory_bytes or 0 for other, _ in self.running)
        return limit is None or not self.running or wanted <= limit


class LocalLauncher(Launcher):
    """Starts processes that outlive this one if it is killed, and are found again by number and time of birth."""

    def __init__(self, concurrent: int, memory: Literal["auto"] | float | None, gpus: Sequence[int] = ()):
        devices = list(gpus) or [None]
        each = -(-concurrent // len(devices))
        self._slots = [_Slot(gpu, each) for gpu in devices]
        self._auto = memory == "auto"
        self.limit_bytes = available_memory() if self._auto else memory

    def measured(self, device_bytes: int | None) -> None:
        if self._auto and device_bytes is not None:
            self.limit_bytes = device_bytes

    def room(self, job: Job) -> bool:
        return any(slot.takes(job, self.limit_bytes) for slot in self._slots)

    def submit(self, job: Job) -> Handle:
        slot = min((slot for slot in self._slots if slot.takes(job, self.limit_bytes)), key=lambda s: len(s.running))
        environment = os.environ | job.environment
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot.gpu)
        if slot.most > 1:
            # By default the first process of JAX takes three quarters of a GPU's memory for itself.
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            with open(job.log, "ab") as log:
                # A session of its own: Ctrl-C reaches the sweep alone, which then asks its runs to save.
                process = subprocess.Popen(
                    job.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
        except OSError as error:
            reason = storage_fault(error) or error.strerror
            raise ResourceError(f"{job.name}: cannot be started: {reason} ({error.filename})") from error
        handle = _Child(process)
        slot.running.append((job, handle))
        return handle

    def attach(self, job: Job, reference: str) -> Handle | None:
        found = _found(reference)
        if found is None:
            return None
        handle = _Other(found, reference)
        min(self._slots, key=lambda slot: len(slot.running)).running.append((job, handle))
        return handle


class _Child:
    """A process that this one started."""

    def __init__(self, process: subprocess.Popen):
        self._process, self._asked = process, False
        self.reference = reference_of(process.pid)

    def poll(self) -> int | None:
        return self._process.poll()

    def cancel(self) -> None:
        if self.poll() is None:
            self._process.send_signal(signal.SIGKILL if self._asked else signal.SIGTERM)
            self._asked = True


class _Other:
    """A process that another one started, whose exit status nobody can know."""

    def __init__(self, process: psutil.Process, reference: str):
        self._process, self._asked = process, False
        self.reference = reference

    def poll(self) -> int | None:
        return None if _runs(self._process) else UNKNOWN

    def cancel(self) -> None:
        if self.poll() is None:
            self._process.send_signal(signal.SIGKILL if self._asked else signal.SIGTERM)
            self._asked = True


def reference_of(pid: int) -> str:
    """``host pid birth``: a number alone is given to other processes later; "" of one that has ended."""
    try:
        return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"
    except psutil.Error:
        return ""


def alive(reference: str) -> bool | None:
    """Whether the process of a reference runs; None if it is of another machine."""
    host, _, _ = reference.partition(" ")
    return None if host != socket.gethostname() else _found(reference) is not None


def _found(reference: str) -> psutil.Process | None:
    host, pid, birth = (reference.split(" ") + ["", ""])[:3]
    if host != socket.gethostname() or not pid.isdecimal():
        return None
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(birth)) < CLOCK_SECONDS
        return process if same and _runs(process) else None
    except (psutil.Error, ValueError):
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def available_memory() -> int:
    """Bytes of memory that are free here, or that this process's control group may still take."""
    found = psutil.virtual_memory().available
    try:
        limit, used, facts = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
        cached = next(int(line.split()[1]) for line in facts.splitlines() if line.startswith("file "))
        return found if limit == "max" else min(found, max(int(limit) - int(used) + cached, 0))
    except (OSError, ValueError, StopIteration):
        return found
