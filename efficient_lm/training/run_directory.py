"""A run's folder: where its files are, who may write to it, and whether it can go on."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from efficient_lm.errors import CheckpointError, ResourceError, storage_fault
from efficient_lm.training.processes import exchange, is_main


class RunDirectory:
    """The folder of a run, locked while the `with` block runs; of many processes, by process 0 for all.

    Raises:
        CheckpointError: another process is writing to it.
        ResourceError: it cannot be made or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The composed config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's files."""
        return self.path / "tokenizer"

    @property
    def origin(self) -> Path:
        """What the published model said that this run began with; absent if it began with none."""
        return self.path / "hugging_face"

    @property
    def summary(self) -> Path:
        """Final metrics."""
        return self.path / "summary.json"

    def __enter__(self) -> "RunDirectory":
        if is_main():
            self._take()
        exchange()
        return self

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            reason = storage_fault(error) or error.strerror
            raise ResourceError(f"run.dir: cannot write to {self.path}: {reason}") from error
        try:
            # The kernel drops the lock when the process ends, however it ends: nothing to clean up after a crash.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CheckpointError(
                f"run.dir: {self.path} is in use by another run; wait for it, or choose another run.name or run.dir"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)


def locate(path: Path) -> tuple[RunDirectory, int | None]:
    """The run directory at a path, or that of a checkpoint in one, and then its step.

    Raises:
        CheckpointError: there is none.
    """
    step = None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    run = RunDirectory(path)
    if not run.config.is_file():
        runs = sorted(str(found.parent) for found in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(runs[:5])}" if runs else ""
        raise CheckpointError(f"{path}: neither a run directory (no config.yaml) nor a published model{hint}")
    return run, step
