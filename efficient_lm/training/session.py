"""What one process does for a run besides stepping: rows of metrics, evaluations, checkpoints, the summary."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.elastic.sizes import plot_sizes, sizes
from efficient_lm.errors import DataError, DivergedError
from efficient_lm.evaluation.bits_per_byte import evaluate
from efficient_lm.evaluation.diagnostics import ROWS, summary
from efficient_lm.models.parameters import Parameters, count_parameters
from efficient_lm.training.accounting import cache_bytes, run_flops_per_token
from efficient_lm.training.checkpoints import Checkpoints, as_items
from efficient_lm.training.clock import Clock
from efficient_lm.training.goodput import COMPLETE, Sessions, goodput, read_sessions
from efficient_lm.training.harm import Harm
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.probes import PROBES_FILE
from efficient_lm.training.processes import is_main, moving, total
from efficient_lm.training.reporting import Console, MetricsFile, plot_loss, write_json_atomically
from efficient_lm.training.run_directory import RunDirectory
from efficient_lm.training.setup import Setup
from efficient_lm.training.spikes import noted
from efficient_lm.training.watching import Watch

log = logging.getLogger(__name__)

FORGOTTEN_FILE = "forgotten.jsonl"
"""Rows of steps that the run went back before."""


class _Stopped(Exception):
    """A signal came during an evaluation."""


@dataclass
class Progress:
    """Where a run stands, on the host.

    Attributes:
        step: optimizer steps done.
        tokens: tokens of text that counted in the loss so far; of a synthetic task, of whole rows.
        seconds: wall time of training so far, over all sessions.
        solved: whether the validation accuracy has reached `train.stop_at_accuracy`.
        skipped_rows: by how many rows of data the run is ahead of its steps, because the run went back past them.
        rollbacks: how often it did.
        unvalidated: whether the evaluation of this step is still to be done.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    solved: bool = False
    skipped_rows: int = 0
    rollbacks: int = 0
    unvalidated: bool = False
    last_validation: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_record(cls, record: dict[str, Any], solved: bool) -> "Progress":
        """Where the run of a checkpoint stood."""
        later = {name: record[name] for name in ("skipped_rows", "rollbacks", "unvalidated") if name in record}
        return cls(record["step"], record["tokens"], record["seconds"], solved, **later)


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
        self._interruption = interruption
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        config = setup.config
        self.metrics, self.forgotten = MetricsFile(run.path), MetricsFile(run.path, FORGOTTEN_FILE)
        self.probes = MetricsFile(run.path, PROBES_FILE)
        if is_main():
            self.console = Console(config.train.steps, progress.step)
            again = self.metrics.resume(progress.step, self._belongs) + self.probes.resume(progress.step)
            self.forgotten.resume(config.train.steps, self._belongs)
            self.tracker = config.tracker.start(run.path, config.run.name, config.dump(), progress.step, again)
        self._validated_at: int | None = None
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

    def _belongs(self, row: dict[str, Any]) -> bool:
        """Whether a row does not come again, as one of a later rollback does, and the last evaluation of a run."""
        final = self.complete and row.get("final") and row["step"] == self.progress.step
        return row.get("rollback", 0) <= self.progress.rollbacks and not final

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
            self._write(
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
        if seen is not None and is_main():
            self.probes.append({"step": step, **seen})
            self.tracker.log({"step": step, **seen}, step)
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
        with _beside_the_step():
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
        for row in self.metrics.cut_after(there.step) if is_main() else ():
            self.forgotten.append(row | {"rollback": there.rollbacks})
        there.seconds, there.last_validation = self.progress.seconds, self.progress.last_validation
        # The loop has the same object.
        vars(self.progress).update(vars(there))
        self._validated_at = None
        self.watch.close()
        self.watch = Watch(self.setup, self.clock, self.run.path, there.step, there.tokens)
        if is_main():
            self.probes.cut_after(there.step)
        self._write(
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
        try:
            with self.clock.measure("evaluation"):
                self._score(state, rows, final)
        except (_Stopped, DataError) as error:
            self.progress.unvalidated = not final
            if isinstance(error, DataError):
                raise

    def _score(self, state: dict[str, Any], rows: int | None, final: bool) -> None:
        data, wanted = self.setup.data, self.setup.config.train.stop_at_accuracy

        def scored(scorer: Callable, params: Parameters) -> dict[str, Any]:
            layout = self.setup.layout
            batches = data.validation_batches(self.setup.config.train.batch_size, rows, *layout.part)
            return evaluate(scorer, params, moving(self._until_stopped(batches)), layout.batch, total)

        params = self._scored_parameters(state)
        scores = scored(self.setup.scorer, params)
        self.progress.last_validation = {f"val_{name}": scores[name] for name in data.figures}
        for part, cut, scorer in self.setup.smaller:
            inside = scored(scorer, cut(params))
            self.progress.last_validation |= {f"val_{name}_{part}": inside[name] for name in data.figures}
        self._validated_at = self.progress.step
        self.progress.solved = self.progress.solved or (wanted is not None and scores["accuracy"] >= wanted)
        self.progress.unvalidated = False
        row = {"step": self.progress.step, "tokens": self.progress.tokens, **self.progress.last_validation}
        row |= {"final": True} if final else {}
        self._write(row | (self._diagnose(state) if self.setup.config.train.diagnostics else {}))

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._interruption.signal and jax.process_count() == 1:
                raise _Stopped
            yield batch

    def _diagnose(self, state: dict[str, Any]) -> dict[str, float]:
        """What a few rows of the validation data do inside the mixers."""
        batch = next(self.setup.data.validation_batches(ROWS, limit_rows=ROWS))
        return summary(self.setup.diagnostics.measure_batch(self._scored_parameters(state), batch))

    def _scored_parameters(self, state: dict[str, Any]) -> Parameters:
        average = self.setup.config.train.average
        return state["average" if average is not None and average.evaluate else "parameters"]

    def save(self, state: dict[str, Any]) -> None:
        """Begin a checkpoint of this step, whose rows are on disk before; none of a step that is to be forgotten."""
        if self.harm is not None:
            return
        self.metrics.settle()
        record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self._seconds(),
            **self.provenance,
        }
        later = ("skipped_rows", "rollbacks", "unvalidated")
        record |= {name: getattr(self.progress, name) for name in later if getattr(self.progress, name)}
        if "spikes" in state:
            record["spikes"] = noted(state["spikes"])
        if self._validated_at == self.progress.step:
            record["val_loss"] = self.progress.last_validation["val_loss"]
        if self.progress.solved:
            record["solved_at_accuracy"] = self.setup.config.train.stop_at_accuracy
        with self.clock.measure("checkpoint"):
            self.checkpoints.save(
                self.progress.step, as_items({name: value for name, value in state.items() if name != "spikes"}), record
            )
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
        self.metrics.settle()
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
        if self.metrics.path.exists():
            plot_loss(self.run.path)
        self.tracker.finish(summary)

    def close(self) -> None:
        """Stop the bar and wait for the disk."""
        if is_main():
            self.console.close()
        self.watch.close()
        self.metrics.close()
        self.probes.close()
        self.forgotten.close()
        self.checkpoints.close()

    def _write(self, row: dict[str, Any]) -> None:
        if not is_main():
            return
        row = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()
        }
        self.metrics.append(row)
        if "rollback" not in row:
            self.console.show(row)
        self.tracker.log(row, row["step"])

    def _flops_per_token(self) -> float:
        """Of the steps so far, on average."""
        return run_flops_per_token(self.setup.config, self.setup.model, self.progress.step)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began


def _beside_the_step() -> contextlib.AbstractContextManager:
    """Where a number is computed at once: an accelerator would first end the step that was just begun."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return contextlib.nullcontext()
