"""The training loop. `train` reads from top to bottom."""

import logging
import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from efficient_lm.config import RunConfig, read_config, save_config
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.elastic.sizes import plot_sizes, sizes
from efficient_lm.errors import CheckpointError, DivergedError
from efficient_lm.evaluation.bits_per_byte import evaluate
from efficient_lm.evaluation.diagnostics import ROWS, summary
from efficient_lm.models.parameters import Parameters, count_parameters
from efficient_lm.training.accounting import step_flops_per_token
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.initialization import read_source
from efficient_lm.training.reporting import Console, MetricsFile, plot_loss, write_json_atomically
from efficient_lm.training.run_directory import RunDirectory, differences
from efficient_lm.training.setup import Setup, prepare
from kernels_pallas.dispatch import preferring

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, on the host.

    Attributes:
        step: optimizer steps done.
        tokens: tokens of text that counted in the loss so far; of a synthetic task, of whole rows.
        seconds: wall time of training so far, over all sessions.
        solved: whether the validation accuracy has reached `train.stop_at_accuracy`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    solved: bool = False
    last_validation: dict[str, float] = field(default_factory=dict)


def train(config: RunConfig) -> dict[str, Any]:
    """Train from a config, or go on from the newest checkpoint of its run directory.

    Returns:
        What `summary.json` holds. `stopped_by` is there only if a signal ended the run early (it is then resumable).

    Raises:
        ConfigError, DataError: before anything is written.
        CheckpointError: the run directory is in use, damaged or of another architecture.
        DivergedError: too many steps in a row that were not a number; everything up to there is saved.
        ResourceError: the disk is full; the newest good checkpoint stays.
    """
    setup = prepare(config)
    config = setup.config
    kernels = preferring(config.train.kernels)
    with setup.layout.active(), kernels, RunDirectory(config.run.dir) as run, Interruption() as interruption:
        checkpoints = Checkpoints(run.checkpoints, config.train.keep_checkpoints)
        state, progress = _resume_or_start(setup, run, checkpoints)
        session = _Session(setup, run, checkpoints, progress)
        try:
            batches = setup.data.train_batches(config.train.batch_size, start_step=progress.step)
            waiting = None
            while not session.complete and not interruption.signal and not session.out_of_time():
                state, metrics = setup.step(state, setup.layout.batch(_trained_on(next(batches))))
                # Metrics are read one step late, so that the device is never idle while the host looks at them.
                session.report(waiting)
                progress.step += 1
                waiting = (progress.step, metrics)
                evaluating, saving = (
                    session.due(config.train.evaluate_every),
                    session.due(config.train.checkpoint_every),
                )
                if evaluating or saving:
                    session.report(waiting)
                    waiting = None
                if evaluating:
                    session.validate(state, config.train.evaluate_rows)
                if saving:
                    session.save(state)
            session.report(waiting)
            session.save(state)
            if session.complete:
                session.validate(state)
            return session.finish(interruption.signal)
        except DivergedError:
            session.save(state)
            raise
        finally:
            session.close()


_OF_ANOTHER = re.compile(r"(model|tokenizer)\.(?!remat|.*\.(implementation|chunk_size): )")
"""Changed keys that make another model; the rest of a model says how it is computed, and not what."""


def _resume_or_start(setup: Setup, run: RunDirectory, checkpoints: Checkpoints) -> tuple[dict[str, Any], Progress]:
    """The newest good checkpoint's state, or a fresh one; `config.yaml` and the tokenizer are written."""
    wanted = setup.config.dump()
    if checkpoints.steps and run.config.is_file():
        changes = differences(read_config(run.config).dump(), wanted)
        breaking = [line for line in changes if _OF_ANOTHER.match(line)]
        if breaking:
            raise CheckpointError(
                f"{run.path}: holds a run of another architecture ({'; '.join(breaking[:3])}); choose another run.name"
            )
        for line in changes:
            log.warning("going on with a changed config: %s", line)
    abstract = setup.abstract_state()
    found = checkpoints.restore({"parameters": abstract.pop("parameters"), "optimizer": abstract})
    save_config(run.config, setup.config)
    setup.tokenizer.save(run.tokenizer)
    if found is None:
        return _begin(setup, run), Progress()
    items, record = found
    checkpoints.set_aside_after(record["step"])
    if record["tokenizer"] != setup.tokenizer.fingerprint:
        raise CheckpointError(f"{run.path}: was trained with another tokenizer; choose another run.name")
    log.warning("resuming %s from step %d", run.path, record["step"])
    return {"parameters": items["parameters"], **items["optimizer"]}, Progress(
        record["step"], record["tokens"], record["seconds"], _still_solved(setup.config, record)
    )


def _still_solved(config: RunConfig, record: dict[str, Any]) -> bool:
    """Whether the accuracy that ended a run is still enough."""
    wanted = config.train.stop_at_accuracy
    return wanted is not None and record.get("solved_at_accuracy", 0.0) >= wanted


def _begin(setup: Setup, run: RunDirectory) -> dict[str, Any]:
    """The state before the first step: from `init_from`, or from the seed."""
    if setup.config.init_from is None:
        return setup.fresh_state()
    source = read_source(Path(setup.config.init_from))
    if source.origin is not None:
        source.origin.save(run.origin)
    length = setup.config.train.sequence_length
    if source.context is not None and length > source.context:
        log.warning(
            "init_from: train.sequence_length %d is beyond the %d tokens that %s was made for; positions there are new "
            "to it (a rotary position's theta and scaling can be set: model.blocks.NAME.mixer.position)",
            length, source.context, source.where,
        )  # fmt: skip
    return setup.fresh_state(source)


def _trained_on(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in batch.items() if name != "target_bytes"}


class _Session:
    """What one process does for a run besides stepping: rows, evaluations, checkpoints."""

    def __init__(self, setup: Setup, run: RunDirectory, checkpoints: Checkpoints, progress: Progress):
        self.setup, self.run, self.checkpoints, self.progress = setup, run, checkpoints, progress
        config = setup.config
        self.console = Console(config.train.steps, progress.step)
        self.metrics = MetricsFile(run.path)
        self.metrics.resume(progress.step)
        self.tracker = config.tracker.start(run.path, config.run.name, config.dump(), progress.step)
        self.began = self.logged_at = time.monotonic()
        self.seconds_before, self.logged_tokens = progress.seconds, progress.tokens

    @property
    def complete(self) -> bool:
        """Whether every step is done, or the rest is not needed."""
        return self.progress.solved or self.progress.step >= self.setup.config.train.steps

    def due(self, interval: int | None) -> bool:
        """Whether an interval ends with the step just done. The last step has its own evaluation and checkpoint."""
        step = self.progress.step
        return interval is not None and step % interval == 0 and step < self.setup.config.train.steps

    def out_of_time(self) -> bool:
        """Whether `train.minutes` are over."""
        minutes = self.setup.config.train.minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    def report(self, waiting: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Read a step's metrics, log a row if one is due, and stop a run that has diverged."""
        if waiting is None:
            return
        step, metrics = waiting
        values = {name: float(value) for name, value in metrics.items()}
        weight, train = int(values.pop("weight")), self.setup.config.train
        reads_text = self.setup.config.data.reads_text
        self.progress.tokens += weight if reads_text else train.batch_size * train.sequence_length
        bad = int(values.pop("nonfinite"))
        if step % train.log_every == 0 or step in (1, train.steps) or bad:
            now = time.monotonic()
            speed = (self.progress.tokens - self.logged_tokens) / max(now - self.logged_at, 1e-9)
            self.logged_at, self.logged_tokens = now, self.progress.tokens
            self._write(
                {
                    "step": step,
                    "tokens": self.progress.tokens,
                    **values,
                    "learning_rate": float(self.setup.schedule(step - 1)),
                    "tokens_per_second": speed,
                    "seconds": self._seconds(),
                    **({"nonfinite_steps": bad} if bad else {}),
                }
            )
        if bad >= train.max_nonfinite:
            raise DivergedError(
                f"the loss was not a number for {bad} steps in a row, up to step {step}; the parameters from before "
                f"are kept in {self.run.checkpoints}. Try a lower optimizer.learning_rate or train.clip_norm"
            )

    def validate(self, state: dict[str, Any], rows: int | None = None) -> None:
        """Score what is held out, `rows` rows or all of it, and log the result."""
        data, wanted = self.setup.data, self.setup.config.train.stop_at_accuracy
        if not data.has_validation:
            return

        def scored(scorer: Callable, params: Parameters) -> dict[str, Any]:
            batches = data.validation_batches(self.setup.config.train.batch_size, limit_rows=rows)
            return evaluate(scorer, params, batches, self.setup.layout.batch)

        scores = scored(self.setup.scorer, state["parameters"])
        self.progress.last_validation = {f"val_{name}": scores[name] for name in data.figures}
        for part, cut, scorer in self.setup.smaller:
            inside = scored(scorer, cut(state["parameters"]))
            self.progress.last_validation |= {f"val_{name}_{part}": inside[name] for name in data.figures}
        self.progress.solved = self.progress.solved or (wanted is not None and scores["accuracy"] >= wanted)
        row = {"step": self.progress.step, "tokens": self.progress.tokens, **self.progress.last_validation}
        self._write(row | (self._diagnose(state) if self.setup.config.train.diagnostics else {}))
        self.logged_at = time.monotonic()

    def _diagnose(self, state: dict[str, Any]) -> dict[str, float]:
        """What a few rows of the validation data do inside the mixers."""
        batch = next(self.setup.data.validation_batches(ROWS, limit_rows=ROWS))
        return summary(self.setup.diagnostics.measure_batch(state["parameters"], batch))

    def save(self, state: dict[str, Any]) -> None:
        """Begin a checkpoint of this step."""
        rest = {name: value for name, value in state.items() if name != "parameters"}
        record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self._seconds(),
            "seed": self.setup.config.run.seed,
            "tokenizer": self.setup.tokenizer.fingerprint,
        }
        if self.progress.solved:
            record["solved_at_accuracy"] = self.setup.config.train.stop_at_accuracy
        self.checkpoints.save(self.progress.step, {"parameters": state["parameters"], "optimizer": rest}, record)

    def finish(self, stopped_by: int) -> dict[str, Any]:
        """Write the summary and the plot of what was reached."""
        self.checkpoints.wait()
        config = self.setup.config
        summary = {
            "run": str(self.run.path),
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self._seconds(),
            "parameters": count_parameters(self.setup.model.declarations),
            "training_flops": step_flops_per_token(config, self.setup.model) * self.progress.tokens,
            **self.progress.last_validation,
        }
        if stopped_by:
            summary["stopped_by"] = signal.Signals(stopped_by).name
        elif self.progress.solved:
            summary["solved_at"] = self.progress.step
        elif self.progress.step < config.train.steps:
            summary["stopped_by"] = "train.minutes"
        if not isinstance(config.nesting, NoNestingSpec):
            found = sizes(self.setup.model, self.progress.last_validation, config.train.sequence_length)
            summary["sizes"] = found
            if all(row["bits_per_byte"] is not None for row in found):
                plot_sizes(found, self.run.path / "plots" / "sizes.png", self.run.path.absolute().name)
        write_json_atomically(self.run.summary, summary)
        if self.metrics.path.exists():
            plot_loss(self.run.path)
        self.tracker.finish(summary)
        return summary

    def close(self) -> None:
        """Stop the bar and wait for the disk."""
        self.console.close()
        self.metrics.close()
        self.checkpoints.close()

    def _write(self, row: dict[str, Any]) -> None:
        row = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()
        }
        self.metrics.append(row)
        self.console.show(row)
        self.tracker.log(row, row["step"])

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began


class Interruption:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; a second one ends the process at once."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        try:
            self._before = {number: signal.signal(number, self._request) for number in self.signals}
        except ValueError:
            # Only the main thread may set handlers; elsewhere the caller decides when to stop.
            self._before = {}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        log.warning("%s: saving and stopping; once more to stop at once", signal.Signals(number).name)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
