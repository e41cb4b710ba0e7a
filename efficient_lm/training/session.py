"""What one process does for a run besides stepping: what is logged, evaluated and saved when, and the summary."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.elastic.sizes import plot_sizes, sizes
from efficient_lm.errors import DivergedError
from efficient_lm.models.parameters import count_parameters
from efficient_lm.runtime import host_device
from efficient_lm.training.accounting import cache_bytes, run_flops_per_token
from efficient_lm.training.checkpoints import Checkpoints, as_items
from efficient_lm.training.clock import Clock
from efficient_lm.training.goodput import COMPLETE, Sessions, goodput, read_sessions
from efficient_lm.training.harm import Harm
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.processes import is_main
from efficient_lm.training.progress import Progress
from efficient_lm.training.reporting import write_json_atomically
from efficient_lm.training.rows import Rows
from efficient_lm.training.run_directory import RunDirectory
from efficient_lm.training.setup import Setup
from efficient_lm.training.spikes import noted
from efficient_lm.training.validating import Validation
from efficient_lm.training.watching import Watch

log = logging.getLogger(__name__)


class Session:
    """What one process does for a run besides stepping: rows, evaluations, checkpoints.

    Attributes:
        harm: steps that were just seen and are to be forgotten (see `rollback`); None mostly.
    """

    def __init__(
        self,
        setup: Setup,
        run: RunDirectory,
        checkpoints: Checkpoints,
        progress: Progress,
        clock: Clock,
        interruption: Interruption,
    ):
        self.setup, self.run, self.checkpoints, self.progress, self.clock = setup, run, checkpoints, progress, clock
        self.provenance = setup.provenance
        self.harm: Harm | None = None
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self.rows = Rows(setup.config, run, progress, self.complete)
        self._validation = Validation(setup, progress, interruption)
        self.sessions = Sessions(run.path, progress.step, clock.elapsed())
        self.watch = Watch(setup, clock, run.path, progress.step, progress.tokens)
        self.began, self.seconds_before = time.monotonic(), progress.seconds

    @property
    def complete(self) -> bool:
        """Whether every step is done, or the rest is not needed."""
        return self.progress.solved or self.progress.step >= self.setup.config.train.steps

    def due(self, interval: int | None) -> bool:
        """Whether an interval ends with the step just done. The last step has its own evaluation and checkpoint."""
        step = self.progress.step
        return interval is not None and step % interval == 0 and step < self.setup.config.train.steps

    @property
    def at_end(self) -> bool:
        """Whether no step is left to this session: all are done, or those up to `train.stop_at`."""
        return self.complete or self._at_stop

    @property
    def out_of_time(self) -> bool:
        """Whether `train.minutes` are over."""
        minutes = self.setup.config.train.minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    @property
    def _at_stop(self) -> bool:
        stop = self.setup.config.train.stop_at
        return stop is not None and self.progress.step >= stop

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Those of the steps to come."""
        setup, progress = self.setup, self.progress
        return self.clock.waiting(
            setup.portions.batches(setup.data, progress.step, *setup.layout.part, progress.skipped_rows)
        )

    def step(self, state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Begin the next step."""
        return self.watch.step(self.progress.step + 1, state, batch)

    def stepped(self, metrics: dict[str, jax.Array]) -> None:
        """Count a step that was begun, and report the one before.

        Metrics are read one step late, so that the device is never idle while the host looks at them.
        """
        self.checkpoints.check()
        self.progress.step += 1
        before, self._waiting = self._waiting, (self.progress.step, metrics)
        self._report(before)

    def settle(self) -> None:
        """Report every step that was begun."""
        before, self._waiting = self._waiting, None
        self._report(before)

    def _report(self, waiting: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Read a step's metrics, log a row if one is due, and stop a run that has diverged."""
        if waiting is None or self.harm is not None:
            return
        step, metrics = waiting
        with self.clock.measure("metrics_wait"):
            values = {name: float(value) for name, value in metrics.items()}
        weight, train = values.pop("weight"), self.setup.config.train
        weight = int(weight) if math.isfinite(weight) else 0
        score = values.pop("spike", 0.0)
        spike = score > train.spike.threshold
        reads_text = self.setup.config.data.reads_text
        self.progress.tokens += weight if reads_text else self.setup.portions.at(step - 1).tokens
        bad = int(values.pop("nonfinite"))
        if step % train.log_every == 0 or step in (1, train.steps) or bad or spike:
            self.rows.write(
                {
                    "step": step,
                    "tokens": self.progress.tokens,
                    **values,
                    "learning_rate": self._learning_rate(step),
                    **self.setup.portions.logged(step - 1),
                    "seconds": self._seconds(),
                    **self.watch.figures(step, self.progress.tokens),
                    **({"nonfinite_steps": bad} if bad else {}),
                    **({"spike": score} if spike else {}),
                }
            )
            self.sessions.beat(step, self.clock.seconds())
        seen = self.watch.read(step)
        if seen is not None:
            self.rows.write_probe({"step": step, **seen})
        if spike:
            done = "; it changed nothing" if train.spike.action == "skip" else ""
            log.warning("step %d stands out by %.1f deviations (train.spike)%s", step, score, done)
        self.harm = self._harm(step, bad, spike)
        if self.harm is not None:
            return
        if bad >= train.max_nonfinite:
            raise DivergedError(
                f"the loss was not a number for {bad} steps in a row, up to step {step}; the parameters from before "
                f"are kept in {self.run.checkpoints}. Try a lower optimizer.learning_rate or train.clip_norm"
            )

    def _learning_rate(self, step: int) -> float:
        # Computed at once: an accelerator would first end the step that was just begun.
        with jax.default_device(host_device()):
            return float(self.setup.schedule(step - 1))

    def _harm(self, step: int, bad: int, spike: bool) -> Harm | None:
        """What is to be forgotten because of a step, if the run may still go back."""
        train = self.setup.config.train
        if self.progress.rollbacks >= train.rollback.at_most:
            return None
        if bad >= train.rollback.after:
            return Harm(step - bad + 1, step, f"the loss was not a number for {bad} steps in a row, up to step {step}")
        if spike and train.spike.action == "rollback":
            return Harm(step, step, f"step {step} stands out")
        return None

    def start_over(self, there: Progress) -> None:
        """Go on from an earlier place; rows from after it are kept apart."""
        harm, self.harm, self._waiting = self.harm, None, None
        self.rows.forget_after(there)
        there.seconds, there.last_validation = self.progress.seconds, self.progress.last_validation
        # The loop has the same object.
        vars(self.progress).update(vars(there))
        self._validation.forget()
        self.watch.close()
        self.watch = Watch(self.setup, self.clock, self.run.path, there.step, there.tokens)
        self.rows.write(
            {
                "step": there.step,
                "rollback": there.rollbacks,
                "reason": harm.reason,
                "from_step": harm.last,
                "skipped_rows": there.skipped_rows,
            }
        )

    def validate(self, state: dict[str, Any], rows: int | None = None, final: bool = False) -> None:
        """Score what is held out, `rows` rows or all of it, and log the result; a signal puts it off."""
        if not self.setup.data.has_validation:
            return
        with self.clock.measure("evaluation"):
            row = self._validation.row(state, rows, final)
            if row is not None:
                self.rows.write(row)

    def prepare_saves(self, state: dict[str, Any]) -> None:
        """Take the memory that saves need, if there will be any while steps go on."""
        train = self.setup.config.train
        if self.progress.step + train.checkpoint_every < min(train.steps, train.stop_at or train.steps):
            self.checkpoints.prepare(_saved(state))

    def save(self, state: dict[str, Any], going_on: bool = False) -> None:
        """Begin a checkpoint of this step, whose rows are on disk before; none of a step that is to be forgotten.

        Args:
            going_on: whether another step follows.
        """
        if self.harm is not None:
            return
        self.rows.settle()
        record = self.progress.record(self._seconds()) | self.provenance
        if "spikes" in state:
            record["spikes"] = noted(state["spikes"])
        if self._validation.is_of_this_step:
            record["val_loss"] = self.progress.last_validation["val_loss"]
        if self.progress.solved:
            record["solved_at_accuracy"] = self.setup.config.train.stop_at_accuracy
        with self.clock.measure("checkpoint"):
            self.checkpoints.save(self.progress.step, _saved(state), record, going_on)
        self.sessions.beat(self.progress.step, self.clock.seconds())

    def rescue(self, state: dict[str, Any], shared: bool) -> str:
        """Save what was trained before a fault, if every process has met it; says what is there then."""
        if shared or jax.process_count() == 1:
            with contextlib.suppress(DivergedError):
                self.settle()
            self.save(state)
            self.checkpoints.wait()
        return self.checkpoints.newest()

    def finish(self, stopped_by: int) -> dict[str, Any]:
        """Write the summary and the plot of what was reached."""
        with self.clock.measure("checkpoint"):
            self.checkpoints.wait()
        self.rows.settle()
        config = self.setup.config
        summary = {
            "run": str(self.run.path),
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self._seconds(),
            "parameters": count_parameters(self.setup.model.declarations),
            "training_flops": self._flops_per_token() * self.progress.tokens,
            "flops_per_token": self.setup.model.flops_per_token(config.train.sequence_length),
            "cache_bytes": cache_bytes(self.setup.model, config.train.sequence_length, config.precision.dtype),
            **self.progress.last_validation,
        }
        if stopped_by:
            summary["stopped_by"] = signal.Signals(stopped_by).name
        elif self.progress.solved:
            summary["solved_at"] = self.progress.step
        elif self.progress.step < config.train.steps:
            summary["stopped_by"] = "train.stop_at" if self._at_stop else "train.minutes"
        if not isinstance(config.nesting, NoNestingSpec):
            last, length = self.progress.last_validation, config.train.sequence_length
            summary["sizes"] = sizes(self.setup.model, last, length)
        self.sessions.beat(self.progress.step, self.clock.seconds(), COMPLETE if self.complete else "end")
        summary["goodput"] = goodput(read_sessions(self.run.path))
        if is_main():
            self._publish(summary)
        return summary

    def _publish(self, summary: dict[str, Any]) -> None:
        found = summary.get("sizes", [])
        if found and all(row["bits_per_byte"] is not None for row in found):
            plot_sizes(found, self.run.path / "plots" / "sizes.png", self.run.path.absolute().name)
        write_json_atomically(self.run.summary, summary)
        self.rows.finish(summary)

    def close(self) -> None:
        """Stop the bar and wait for the disk."""
        self.rows.close()
        self.watch.close()
        self.checkpoints.close()

    def _flops_per_token(self) -> float:
        """Of the steps so far, on average."""
        return run_flops_per_token(self.setup.config, self.setup.model, self.progress.step)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """What of a state is among a checkpoint's arrays, and not in its record."""
    return as_items({name: value for name, value in state.items() if name != "spikes"})
