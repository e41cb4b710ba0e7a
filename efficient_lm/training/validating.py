"""What a run's evaluations measure: the held-out data, by the model and by the smaller ones inside it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from efficient_lm.errors import DataError
from efficient_lm.evaluation.bits_per_byte import evaluate
from efficient_lm.evaluation.diagnostics import ROWS, summary
from efficient_lm.models.parameters import Parameters
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.processes import moving, total
from efficient_lm.training.progress import Progress
from efficient_lm.training.setup import Setup


class _Stopped(Exception):
    """A signal came during an evaluation."""


class Validation:
    """Scores what is held out, and notes it in a run's progress."""

    def __init__(self, setup: Setup, progress: Progress, interruption: Interruption):
        self._setup, self._progress, self._interruption = setup, progress, interruption
        self._step: int | None = None

    @property
    def is_of_this_step(self) -> bool:
        """Whether the last scores are of the parameters as they are."""
        return self._step == self._progress.step

    def forget(self) -> None:
        """The run has gone back: what was scored is not of its parameters."""
        self._step = None

    def row(self, state: dict[str, Any], rows: int | None, final: bool) -> dict[str, Any] | None:
        """The row of an evaluation of `rows` rows of held-out data, or of all of it; None where a signal puts it off.

        Raises:
            DataError: the data is no longer as it was; the evaluation is still to be done.
        """
        try:
            return self._scored(state, rows, final)
        except (_Stopped, DataError) as error:
            self._progress.unvalidated = not final
            if isinstance(error, DataError):
                raise
            return None

    def _scored(self, state: dict[str, Any], rows: int | None, final: bool) -> dict[str, Any]:
        setup, progress, train = self._setup, self._progress, self._setup.config.train
        params, figures, wanted = self._parameters(state), setup.data.figures, train.stop_at_accuracy

        def scored(scorer: Callable, params: Parameters) -> dict[str, Any]:
            # As many rows at a time as a step computes, so that what holds the step holds this too.
            batches = setup.data.validation_batches(train.batch_size // train.accumulate, rows, *setup.layout.part)
            return evaluate(scorer, params, moving(self._until_stopped(batches)), setup.layout.batch, self._total)

        scores = scored(setup.scorer, params)
        progress.last_validation = {f"val_{name}": scores[name] for name in figures}
        for part, cut, scorer in setup.smaller:
            inside = scored(scorer, cut(params))
            progress.last_validation |= {f"val_{name}_{part}": inside[name] for name in figures}
        self._step, progress.unvalidated = progress.step, False
        progress.solved = progress.solved or (wanted is not None and scores["accuracy"] >= wanted)
        row = {"step": progress.step, "tokens": progress.tokens, **progress.last_validation}
        return row | ({"final": True} if final else {}) | (self._diagnosed(params) if train.diagnostics else {})

    def _total(self, value: float) -> float:
        """The sum over the parts of a batch, each of which several processes may hold, as a tensor axis has them do."""
        return total(value) * self._setup.layout.part[1] / jax.process_count()

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._interruption.signal and jax.process_count() == 1:
                raise _Stopped
            yield batch

    def _diagnosed(self, params: Parameters) -> dict[str, float]:
        """What a few rows of the validation data do inside the mixers."""
        batch = next(self._setup.data.validation_batches(ROWS, limit_rows=ROWS))
        return summary(self._setup.diagnostics.measure_batch(params, batch))

    def _parameters(self, state: dict[str, Any]) -> Parameters:
        average = self._setup.config.train.average
        return state["average" if average is not None and average.evaluate else "parameters"]
