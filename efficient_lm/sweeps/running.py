"""Runs of a sweep are started, watched and counted, until every arm has ended. Imports no jax.

The study knows at any moment what a process that starts anew has to know: this one may be killed anywhere.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.sweeps.axes import as_text
from efficient_lm.sweeps.launchers.base import UNKNOWN, Handle, Job, Launcher
from efficient_lm.sweeps.launchers.slurm import SlurmLauncherSpec
from efficient_lm.sweeps.outcomes import Outcome, Tail, in_use, is_complete, number, outcome, saved_step
from efficient_lm.sweeps.plans import Plan, again
from efficient_lm.sweeps.searches import Objective
from efficient_lm.sweeps.study import Study
from efficient_lm.sweeps.table import Row
from efficient_lm.training.interruption import Interruption

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
WATCH_SECONDS = 2.0
"""Between looks at the metrics of runs."""
LOOK_SECONDS = 5.0
"""Between looks at what other processes of the sweep have done."""
BEAT_SECONDS = 20.0
AGAIN_SECONDS = 60.0
"""After which a run that could not be started is tried again."""
PATIENCE_SECONDS = 300.0
"""With a run that was asked to save and stop."""

RUNS = "runs"
LOG_FILE = "output.log"
PROGRAM = (sys.executable, "-m", "efficient_lm")
PASSED_ON = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "EFFICIENT_LM_CACHE",
    "PYTHONPATH",
)
"""Variables that a run elsewhere is to have as well: all share one cache of compiled programs."""
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass
class Active:
    """A run that this process has started, or found.

    Attributes:
        reported: steps that the study has a figure of.
        asked_at: when it was asked to stop; None: it was not.
        last: the newest value of each of its metrics.
    """

    trial: FrozenTrial
    handle: Handle
    tail: Tail
    reported: set[int]
    asked_at: float | None = None
    last: dict[str, Any] = field(default_factory=dict)

    def ask(self) -> None:
        """Ask it to save and stop, unless it was asked before; one that does not is made to."""
        now = time.monotonic()
        if self.asked_at is None or now - self.asked_at > PATIENCE_SECONDS:
            self.handle.cancel()
            self.asked_at = now

    @property
    def arm(self) -> str:
        """Its name."""
        return self.trial.user_attrs["arm"]


def attached(launcher: Launcher, job: Job, reference: str) -> Handle | None:
    """The run that a reference names, if it lives; one in the queue of SLURM whatever launcher the sweep has now."""
    handle = launcher.attach(job, reference)
    if handle is not None or not reference.startswith("slurm "):
        return handle
    try:
        return SlurmLauncherSpec().build().attach(job, reference)
    except ConfigError:
        log.warning("%s: may wait in a queue as %s, and no SLURM is here to be asked", job.name, reference)
        return None


class Runner:
    """Brings a sweep to its end.

    Args:
        folder: of the sweep.
        objectives: what is told of a finished run.
        prunes: whether runs may be stopped early.
        restarts: see `SweepConfig`.
        retry_failed: whether arms that have failed until now are begun once more.
        config_dirs: folders of further groups and choices.
        changed: called with all rows when the state of one has changed.
        watched: called now and then with what is running; None: nobody looks.
        program: what a verb is appended to.
    """

    def __init__(
        self,
        folder: Path,
        study: Study,
        plan: Plan,
        launcher: Launcher,
        objectives: Sequence[Objective],
        prunes: bool = False,
        restarts: int = 3,
        retry_failed: bool = False,
        config_dirs: Sequence[str] = (),
        changed: Callable[[list[Row]], None] = lambda rows: None,
        watched: Callable[[list[Active]], None] | None = None,
        program: Sequence[str] = PROGRAM,
    ):
        self.folder, self.study, self.plan, self.launcher = folder, study, plan, launcher
        self._objectives, self._prunes, self._restarts = objectives, prunes, restarts
        self._options = [part for folder in config_dirs for part in ("--config-dir", str(Path(folder).absolute()))]
        self._changed, self._watched, self._program = changed, watched, list(program)
        self._active: list[Active] = []
        self._ready: FrozenTrial | None = None
        self._stopping = False
        self._not_before: dict[str, float] = {}
        self._look_at = self._watch_at = self._beat_at = 0.0
        failed = {name: trial for name, trial in study.trials().items() if trial.state is TrialState.FAIL}
        self._to_retry = {name: trial.number for name, trial in failed.items()} if retry_failed else {}

    def run(self, interruption: Interruption) -> bool:
        """Run until every arm has ended, or a signal comes; says whether every arm has.

        A signal asks the runs to save and stop, and this waits for them. On a fault they are asked as well.
        """
        try:
            self._changed(self.rows())
            while not interruption.signal:
                self._collect()
                if not self._start():
                    return True
                self._watch()
                time.sleep(POLL_SECONDS)
            self._stop()
            return False
        except BaseException:
            for active in self._active:
                active.ask()
            raise

    def rows(self) -> list[Row]:
        """Every arm that is known, in order."""
        trials, claimed = self.study.trials(), self.study.claimed()
        found = []
        for name in self.plan.names:
            trial, arm = trials.get(name), self.plan.known(name)
            run = f"{RUNS}/{name}"
            if trial is not None:
                told = trial.user_attrs
                state = STATES.get(trial.state) or ("running" if name in claimed else "interrupted")
                reason = told.get("reason", "") if state not in ("running", "finished") else ""
                found.append(Row(name, told["choices"], told["seed"], state, run, told["figures"], reason))
            elif arm is not None:
                found.append(Row(name, dict(arm.choices), arm.seed, "waiting", run))
        return found

    def _start(self) -> bool:
        """Start what there is room for; False once every arm has ended."""
        now = time.monotonic()
        while self._ready is not None or now >= self._look_at:
            if self._ready is None and not self._claim(now):
                return bool(self._active) or not self._all_ended()
            if self._ready is None or not self.launcher.room(self._job(self._ready)):
                return True
            trial, self._ready = self._ready, None
            self._launch(trial)
        return True

    def _claim(self, now: float) -> bool:
        """Make an arm ready; False if there is none to be had now."""
        if not self.launcher.room(Job("", [], self.folder, {}, None, self.folder)):
            return True
        trials, claimed = self.study.trials(), self.study.claimed()
        for name in self.plan.names:
            if self._ended(name, trials.get(name)) or name in claimed or self._not_before.get(name, 0) > now:
                continue
            reference = self.study.claim(name)
            if reference is not None and self._begin(name, reference):
                return True
        self._look_at = now + LOOK_SECONDS
        return False

    def _ended(self, name: str, trial: FrozenTrial | None) -> bool:
        if trial is None or not trial.state.is_finished():
            return False
        return not (trial.state is TrialState.FAIL and self._to_retry.get(name) == trial.number)

    def _all_ended(self) -> bool:
        trials = self.study.trials()
        return all(self._ended(name, trials.get(name)) for name in self.plan.names)

    def _begin(self, name: str, reference: str) -> bool:
        """Go on with an arm that was claimed just now; False if there is nothing to do with it."""
        trials = self.study.trials()
        trial = trials.get(name)
        if self._ended(name, trial):
            self.study.release(name)
            return False
        if trial is not None and not trial.state.is_finished():
            handle = attached(self.launcher, self._job(trial), reference) if reference else None
            if handle is not None:
                log.info("%s: still running", name)
                self._follow_from_now(trial, handle)
                return True
            if in_use(self._directory(trial)):
                # A process that nobody knows by number, of a sweep that was killed, still trains it.
                self._not_before[name] = time.monotonic() + LOOK_SECONDS
                self.study.release(name)
                return False
            if trial.user_attrs.get("pruned_at") is not None or is_complete(self._directory(trial)):
                self._settle(trial, UNKNOWN)
                return True
        else:
            trial = self.plan.begin(self.study, name, trials) if trial is None else again(self.study, trial)
            self._to_retry.pop(name, None)
        if trial is None:
            self.study.release(name)
            return False
        if trial.user_attrs.get("reason") and not trial.user_attrs.get("restarts"):
            self.study.end(trial, TrialState.FAIL)
            self._leave(name)
            return True
        self._ready = trial
        return True

    def _launch(self, trial: FrozenTrial) -> None:
        job = self._job(trial)
        job.directory.mkdir(parents=True, exist_ok=True)
        try:
            handle = self.launcher.submit(job)
        except ResourceError as error:
            if not self._active:
                raise
            # A full queue or disk: what runs makes room.
            log.warning("%s; tried again in %d s", error, AGAIN_SECONDS)
            self._not_before[job.name] = time.monotonic() + AGAIN_SECONDS
            self._leave(job.name)
            return
        self.study.note(job.name, handle.reference)
        self._follow_from_now(trial, handle)

    def _follow_from_now(self, trial: FrozenTrial, handle: Handle) -> None:
        active = Active(trial, handle, Tail(self._directory(trial)), set(trial.intermediate_values))
        self._active.append(active)
        if trial.user_attrs.get("pruned_at") is not None:
            active.ask()
        self._changed(self.rows())

    def _leave(self, name: str) -> None:
        """An arm is no longer this process's."""
        self.study.release(name)
        self._changed(self.rows())

    def _job(self, trial: FrozenTrial) -> Job:
        told, directory = trial.user_attrs, self._directory(trial)
        own = [f"run.name='{told['arm']}'", f"run.dir={as_text(str(directory))}"]
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"PYTHONUNBUFFERED": "1", "EFFICIENT_LM_SWEEP": self.folder.name}
        argv = [*self._program, "train", *told["overrides"], *own, *self._options]
        return Job(told["arm"], argv, directory, environment, told["memory"], directory / LOG_FILE)

    def _directory(self, trial: FrozenTrial) -> Path:
        return self.folder / RUNS / trial.user_attrs["arm"]

    def _collect(self) -> None:
        """Count runs that have ended."""
        now = time.monotonic()
        if now >= self._beat_at:
            self.study.beat()
            self._beat_at = now + BEAT_SECONDS
        for active in list(self._active):
            status = active.handle.poll()
            if status is None and active.asked_at is not None:
                active.ask()
            elif status is not None:
                self._active.remove(active)
                self._follow(active)
                self._settle(self.study.trial(active.arm), status)
                self._look_at = 0.0

    def _watch(self) -> None:
        """Look at the metrics of what runs."""
        now = time.monotonic()
        if now < self._watch_at or not (self._prunes or self._watched):
            return
        self._watch_at = now + WATCH_SECONDS
        for active in self._active:
            self._follow(active)
        if self._watched:
            self._watched(self._active)

    def _follow(self, active: Active) -> None:
        """Tell the study what a run has reached, and stop it if it is behind."""
        new = False
        for row in active.tail.rows():
            active.last |= row
            value, step = number(row.get(self._objectives[0].name)), row["step"]
            if self._prunes and value is not None and not row.get("final") and step not in active.reported:
                self.study.report(active.trial, step, value)
                active.reported.add(step)
                new = True
        if new and active.asked_at is None and active.handle.poll() is None and self.study.is_behind(active.trial):
            step = max(active.reported)
            self.study.keep(active.trial, pruned_at=step, reason=f"behind others at step {step}")
            active.ask()

    def _settle(self, trial: FrozenTrial, status: int) -> None:
        """Note what became of a run."""
        directory, told = self._directory(trial), trial.user_attrs
        found = outcome(directory, status, directory / LOG_FILE)
        figures = {**told["figures"], **found.figures}
        values = [number(figures.get(objective.name)) for objective in self._objectives]
        with contextlib.suppress(UpdateFinishedTrialError):
            if told.get("pruned_at") is not None:
                self._end(trial, TrialState.PRUNED, figures)
            elif found.kind == "complete" and None in values:
                missing = self._objectives[values.index(None)].name
                self._end(trial, TrialState.FAIL, figures, f"summary.json has no finite {missing}")
            elif found.kind == "complete":
                self._end(trial, TrialState.COMPLETE, figures, values=values)
            elif found.kind == "failed":
                self._end(trial, TrialState.FAIL, figures, found.reason)
            else:
                self._interrupted(trial, found)
        self._leave(told["arm"])

    def _interrupted(self, trial: FrozenTrial, found: Outcome) -> None:
        """A run that can go on does so, unless it was ended again and again without saving a step in between."""
        directory, name = self._directory(trial), trial.user_attrs["arm"]
        if in_use(directory):
            self._not_before[name] = time.monotonic() + LOOK_SECONDS
            return
        if self._stopping:
            return
        step, before = saved_step(directory), trial.user_attrs.get("restarts", {"step": -1, "count": 0})
        count = before["count"] + 1 if step <= before["step"] else 1
        if count > self._restarts:
            tried = f", {count} times without a step saved in between" if count > 1 else ""
            self._end(trial, TrialState.FAIL, trial.user_attrs["figures"] | found.figures, found.reason + tried)
            return
        self.study.keep(trial, restarts={"step": step, "count": count}, reason=found.reason)
        log.warning("%s: %s; it goes on from step %d", name, found.reason, step)

    def _end(
        self,
        trial: FrozenTrial,
        state: TrialState,
        figures: dict[str, Any],
        reason: str = "",
        values: Sequence[float] | None = None,
    ) -> None:
        self.study.keep(trial, figures=figures, **({"reason": reason} if reason else {}))
        self.study.end(trial, state, values)

    def _stop(self) -> None:
        """Ask all runs to save and stop, and wait for them."""
        self._stopping = True
        if self._ready is not None:
            self.study.release(self._ready.user_attrs["arm"])
        for active in self._active:
            active.ask()
        while self._active:
            self._collect()
            time.sleep(POLL_SECONDS)
