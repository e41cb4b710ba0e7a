"""Experiment trackers. A run never fails or waits for its tracker: what goes wrong there is one warning."""

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from efficient_lm.spec import Choice, Listing

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
START_SECONDS = 30
FINISH_SECONDS = 60
PROBE_SECONDS = 2


class Tracker:
    """Receives a run's rows. This one does nothing with them."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """One row of metrics."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The final figures; the last call."""


class TrackerSpec(Choice, role="tracker"):
    """Where a run's metrics go besides its own folder."""

    def start(self, run_dir: str | Path, name: str, config: dict[str, Any], resume_step: int = 0) -> Tracker:
        """Begin, or go on after `resume_step` steps."""
        raise TypeError(f"{type(self).__name__} does not define start")


class NoTrackerSpec(TrackerSpec):
    """Nowhere else."""

    kind: Literal["none"] = "none"

    def start(self, run_dir: str | Path, name: str, config: dict[str, Any], resume_step: int = 0) -> Tracker:
        return Tracker()


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

    def start(self, run_dir: str | Path, name: str, config: dict[str, Any], resume_step: int = 0) -> Tracker:
        return Wandb(self, Path(run_dir), name, config)


class Wandb(Tracker):
    """A W&B run; one that fails is given up, and the training run goes on."""

    def __init__(self, spec: WandbSpec, run_dir: Path, name: str, config: dict[str, Any]):
        self._run: Any = None
        self._attempt(lambda: self._start(spec, run_dir, name, config))

    def log(self, row: dict[str, Any], step: int) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log({**row, "step": step}))

    def finish(self, summary: dict[str, Any]) -> None:
        if self._run is None:
            return
        # A server that stopped answering would hold the process for as long as uploads are retried.
        worker = threading.Thread(target=self._attempt, args=(lambda: self._finish(summary),), daemon=True)
        worker.start()
        worker.join(FINISH_SECONDS)
        if worker.is_alive():
            log.warning("wandb did not finish within %d s; `wandb sync` uploads the rest", FINISH_SECONDS)

    def _start(self, spec: WandbSpec, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        mode = spec.mode if spec.mode != "auto" else _reachable_mode(wandb)
        settings = wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=spec.project,
            entity=spec.entity,
            group=spec.group,
            tags=list(spec.tags),
            name=name,
            config=config,
            dir=run_dir,
            mode=mode,
            id=_run_id(run_dir),
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        # W&B's own step counter cannot go back, as a run does that resumes from its newest checkpoint.
        self._run.define_metric("*", step_metric="step")
        log.info("wandb: %s", self._run.url if mode == "online" else f"offline in {run_dir / 'wandb'}")

    def _finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            log.warning("wandb failed and is left out from here on: %s", (str(error).splitlines() or [repr(error)])[0])


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
