"""What every launcher has: it starts runs as processes somewhere, and says when they ended. Imports no jax.

A launcher is a file of this folder that registers a kind, and `configs/launcher/KIND.yaml`. It schedules no machines of
its own: where there is a scheduler it hands runs over to it.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

from efficient_lm.spec import Choice, Count

UNKNOWN = -256
"""Exit status of a run that has ended, when nobody can say how; its run directory then tells what became of it."""


class Job(NamedTuple):
    """A run to be started.

    Attributes:
        name: of the run, unique in its sweep.
        argv: the process: ``[python, "-m", "efficient_lm", "train", ...]``.
        directory: the run directory; the run makes it, unless a session before has.
        environment: variables on top of those that the launcher's processes have anyway.
        memory_bytes: the most the run will have of the memory that runs share; None if nobody counted.
        log: what the process writes to stdout and stderr is appended to this file, whose folder is there.
    """

    name: str
    argv: list[str]
    directory: Path
    environment: dict[str, str]
    memory_bytes: int | None
    log: Path


class Handle(Protocol):
    """A run that was started.

    Attributes:
        reference: text by which `Launcher.attach` finds it again from another process; "" if it cannot be found.
    """

    reference: str

    def poll(self) -> int | None:
        """Exit status of the process, None while it runs or waits; ``-9`` or ``137``: killed by signal 9.

        Asked several times a second: what is dear to find out is remembered for a while.
        """
        ...

    def cancel(self) -> None:
        """Ask the run to save and stop, as SIGTERM does, and return at once; again: make it stop."""
        ...


class Launcher:
    """Starts runs, at most `concurrent` of them at once.

    Attributes:
        limit_bytes: of memory that runs share; a run that has more by itself is refused before the sweep. None: any.
    """

    limit_bytes: float | None = None

    def measured(self, device_bytes: int | None) -> None:
        """Told before the first run: the memory of an accelerator of this machine; None where there is none."""

    def room(self, job: Job) -> bool:
        """Whether `submit` would take this job now; the sweep asks before."""
        raise TypeError(f"{type(self).__name__} does not define room")

    def submit(self, job: Job) -> Handle:
        """Start a run, or put it into a scheduler's queue.

        Raises:
            ResourceError: it cannot be started.
        """
        raise TypeError(f"{type(self).__name__} does not define submit")

    def attach(self, job: Job, reference: str) -> Handle | None:
        """A run that another process of the sweep started, which has ended since; None if it no longer runs."""
        return None

    def close(self) -> None:
        """The sweep needs it no more. Runs that still run, as after a second Ctrl-C, are left alone."""


class LauncherSpec(Choice, role="launcher"):
    """Where runs are started.

    Attributes:
        concurrent: runs at once.
    """

    concurrent: Count = 1

    @property
    def counts_memory(self) -> bool:
        """Whether `Job.memory_bytes` is wanted: every candidate is then compiled before the sweep."""
        return False

    @property
    def remote(self) -> bool:
        """Whether runs are on other machines than this one: what this one has is then no reason to refuse them."""
        return False

    def build(self) -> Launcher:
        """The launcher. Raises `ConfigError` where this machine has not what it needs, with its name."""
        raise TypeError(f"{type(self).__name__} does not define build")
