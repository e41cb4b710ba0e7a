"""Experiment trackers. A run never fails or waits for its tracker: what goes wrong there is one warning."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

from pydantic import Field

from efficient_lm.spec import Choice, Listing, OneOf

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
START_SECONDS = 30
FINISH_SECONDS = 60
PROBE_SECONDS = 2

Row = dict[str, Any]


class Tracker:
    """Receives a run's rows. This one does nothing with them."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """One row of metrics."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The final figures; the last call."""


@dataclass(frozen=True)
class Tracked:
    """A run as it is given to a tracker.

    Attributes:
        resume_step: steps after which it goes on.
        repeated: rows of before that will come again.
    """

    run_dir: Path
    name: str
    config: dict[str, Any]
    resume_step: int = 0
    repeated: Sequence[Row] = ()


class TrackerSpec(Choice, role="tracker"):
    """Where a run's metrics go besides its own folder."""

    def start(
        self,
        run_dir: str | Path,
        name: str,
        config: dict[str, Any],
        resume_step: int = 0,
        repeated: Sequence[Row] = (),
    ) -> Tracker:
        """Begin, or go on: see `Tracked`."""
        return self.begin(Tracked(Path(run_dir), name, config, resume_step, repeated))

    def begin(self, run: Tracked) -> Tracker:
        """What follows a run."""
        raise TypeError(f"{type(self).__name__} does not define begin")


class NoTrackerSpec(TrackerSpec):
    """Nowhere else."""

    kind: Literal["none"] = "none"

    def begin(self, run: Tracked) -> Tracker:
        return Tracker()


class SeveralTrackersSpec(TrackerSpec):
    """Several at once.

    Attributes:
        trackers: by any name; one that fails is given up by itself.
    """

    kind: Literal["several"] = "several"
    trackers: Annotated[dict[str, OneOf[TrackerSpec]], Field(min_length=1)]

    def begin(self, run: Tracked) -> Tracker:
        return _Several([spec.begin(run) for spec in self.trackers.values()])


class _Several(Tracker):
    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def log(self, row: Row, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(row, step)

    def finish(self, summary: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.finish(summary)


class _Attempting(Tracker):
    """A tracker whose first failure is a warning and the last that is heard of it.

    Attributes:
        name: for the warning.
        working: False once it has failed.
    """

    name = ""

    def __init__(self) -> None:
        self.working = True

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something, unless it failed before."""
        if not self.working:
            return
        try:
            action()
        except Exception as error:
            self.working = False
            reason = (str(error).splitlines() or [repr(error)])[0]
            log.warning("%s failed and is left out from here on: %s", self.name, reason)


class TensorBoardSpec(TrackerSpec):
    """TensorBoard's event files in `<run>/tensorboard`, for ``tensorboard --logdir runs``."""

    kind: Literal["tensorboard"] = "tensorboard"

    def begin(self, run: Tracked) -> Tracker:
        return TensorBoard(run)


class TensorBoard(_Attempting):
    """Writes a file of events for each session; a row is one record, on disk as soon as it is logged."""

    name = "tensorboard"

    def __init__(self, run: Tracked):
        super().__init__()
        self._writer: Any = None
        self.attempt(lambda: self._start(run.run_dir / "tensorboard", run.config, run.resume_step))

    def log(self, row: Row, step: int) -> None:
        self.attempt(lambda: self._log(row, step))

    def finish(self, summary: dict[str, Any]) -> None:
        self.attempt(lambda: self._finish(summary))

    def _start(self, folder: Path, config: dict[str, Any], resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # Names of files tell seconds, and a second session may begin in the same one.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # What earlier sessions logged from this step on is hidden: it comes again.
        self._write(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._text("config", config, resume_step)

    def _log(self, row: Row, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=Summary(value=values))

    def _finish(self, summary: dict[str, Any]) -> None:
        self._text("summary", summary, summary["step"])
        self._writer.close()

    def _text(self, tag: str, values: dict[str, Any], step: int) -> None:
        from tensorboardX.summary import text

        lines = json.dumps(values, indent=2).splitlines()
        self._write(step, summary=text(tag, "\n".join(f"    {line}" for line in lines)))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


class WandbSpec(TrackerSpec):
    """Weights & Biases.

    Attributes:
        project, entity, group, tags: where the run appears.
        mode: ``auto`` is online where there is an API key and the server answers, offline otherwise. Offline runs lie
            in `<run>/wandb` and are uploaded later by ``wandb sync``.
    """

    kind: Literal["wandb"] = "wandb"
    project: str = "efficient-lm"
    entity: str | None = None
    group: str | None = None
    tags: Listing[str] = ()
    mode: Literal["auto", "online", "offline"] = "auto"

    def begin(self, run: Tracked) -> Tracker:
        return Wandb(self, run)


class Wandb(_Attempting):
    """A W&B run; one that fails is given up, and the training run goes on."""

    name = "wandb"

    def __init__(self, spec: WandbSpec, run: Tracked):
        super().__init__()
        self._run: Any = None
        # W&B keeps every row it was ever given: one that comes again, with the same figures, is left out.
        known = (run.run_dir / RUN_ID_FILE).exists()
        self._sent = {_identity(row, row["step"]) for row in run.repeated} if known else set()
        self.attempt(lambda: self._start(spec, run))

    def log(self, row: Row, step: int) -> None:
        if _identity(row, step) not in self._sent:
            self.attempt(lambda: self._run.log({**row, "step": step}))

    def finish(self, summary: dict[str, Any]) -> None:
        # A server that stopped answering would hold the process for as long as uploads are retried.
        worker = threading.Thread(target=self.attempt, args=(lambda: self._finish(summary),), daemon=True)
        worker.start()
        worker.join(FINISH_SECONDS)
        if worker.is_alive():
            log.warning("wandb did not finish within %d s; `wandb sync` uploads the rest", FINISH_SECONDS)

    def _start(self, spec: WandbSpec, run: Tracked) -> None:
        import wandb

        mode = spec.mode if spec.mode != "auto" else _reachable_mode(wandb)
        # Neither the working folder's source nor its remote, whose address may hold a password, is the run's business.
        private = {"disable_code": True, "disable_git": True}
        settings = wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS, **private)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=spec.project,
            entity=spec.entity,
            group=spec.group,
            tags=list(spec.tags),
            name=run.name,
            config=run.config,
            dir=run.run_dir,
            mode=mode,
            id=_run_id(run.run_dir),
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        # W&B's own step counter cannot go back, as a run does that resumes from its newest checkpoint.
        self._run.define_metric("*", step_metric="step")
        log.info("wandb: %s", self._run.url if mode == "online" else f"offline in {run.run_dir / 'wandb'}")

    def _finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


def _identity(row: Row, step: int) -> tuple[int, str]:
    """What tells a row from others: its step, and whether it is of training, of validation or of something else."""
    return step, next(iter(name for name in row if name not in ("step", "tokens")), "")


def _run_id(run_dir: Path) -> str:
    """The same W&B run for every session of a run directory."""
    file = run_dir / RUN_ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text().strip()


def _reachable_mode(wandb: Any) -> str:
    """Online if there is a key and the server takes connections."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    address = urlparse(wandb.Settings().base_url)
    try:
        key = wandb.api.api_key
        with socket.create_connection((address.hostname, address.port or 443), PROBE_SECONDS):
            return "online" if key else "offline"
    except Exception:
        return "offline"
