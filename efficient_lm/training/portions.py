"""What a step is given: how many rows, and how long they are, where either changes during a run.

The batch grows as in GPT-3 (Brown et al. 2020, arXiv 2005.14165, section 2.3) and the sequences as in Li et al. 2022
(arXiv 2108.06084) and SkyLadder (Zhu et al. 2025, arXiv 2503.15450). Rows are read from the data at their full length,
and where a step's are shorter, each is cut into pieces: no token is left out or seen twice, and a step has as many
tokens as it would have with whole rows.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field

from efficient_lm.data.base import BatchIterator, Data
from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.packing import Batch
from efficient_lm.errors import ConfigError
from efficient_lm.spec import Count, Listing, Spec
from efficient_lm.training.schedules import Duration, steps_of

if TYPE_CHECKING:
    from efficient_lm.config import TrainSpec
    from efficient_lm.training.parallelism import Layout

log = logging.getLogger(__name__)


class StageSpec(Spec):
    """A size that holds `until` a step (a whole number: steps from the run's begin; below 1: a fraction of the run)."""

    until: Annotated[Duration, Field(gt=0)]
    size: Count


class GrowthSpec(Spec):
    """A size that grows to the last one in stages of equally many steps.

    Attributes:
        start: the first size.
        until: the step from which on the last size holds; a whole number, or below 1 a fraction of the run.
        add: what each stage adds; null doubles.
    """

    start: Count
    until: Annotated[Duration, Field(gt=0)]
    add: Count | None = None

    def sizes(self, last: int) -> list[int]:
        """The sizes below the last one."""
        found, size = [], self.start
        while size < last:
            found.append(size)
            size = 2 * size if self.add is None else size + self.add
        return found


def _listed(value: object) -> object:
    """A growth and a list of stages are told apart before either is checked, so that faults are of the one meant."""
    if isinstance(value, dict):
        return GrowthSpec.model_validate(value)
    return value


SizeSchedule = Annotated[Listing[StageSpec] | GrowthSpec, BeforeValidator(_listed)]
"""Sizes before the last one: stages in order, or a growth."""


class Portion(NamedTuple):
    """What the steps from `step` on are given.

    Attributes:
        step: the first of them.
        rows: read from the data, at full length.
        pieces: that each row is cut into.
        length: tokens of a piece.
    """

    step: int
    rows: int
    pieces: int
    length: int

    @property
    def batch(self) -> tuple[int, int]:
        """Shape of the arrays of a step."""
        return self.rows * self.pieces, self.length

    @property
    def tokens(self) -> int:
        """Places for tokens in a step."""
        return self.rows * self.pieces * self.length


class Portions:
    """The portions of a run.

    Args:
        train: with its `sequence_length` known.

    Raises:
        ConfigError: stages that are not in order, lengths that do not divide the full one.
    """

    def __init__(self, train: "TrainSpec"):
        full, steps = train.sequence_length, train.steps
        sizes = _stages("train.batch_schedule", train.batch_schedule, train.batch_size, steps)
        lengths = _stages("train.sequence_schedule", train.sequence_schedule, full, steps)
        for _, length in lengths:
            if full % length:
                near = sorted((d for d in range(1, full + 1) if full % d == 0), key=lambda d: abs(d - length))[:3]
                raise ConfigError(
                    f"train.sequence_schedule: {length} tokens do not divide train.sequence_length={full}; "
                    f"nearest that do: {', '.join(map(str, sorted(near)))}"
                )
        self.steps, self.sizes = steps, BatchSizes(sizes)
        changes = sorted({step for step, _ in (*sizes, *lengths)})
        self.portions = [
            Portion(step, self.sizes.rows(step), full // length, length)
            for step in changes
            for length in [_at(lengths, step)]
        ]
        for portion in self.portions:
            if portion.rows % train.accumulate:
                raise ConfigError(
                    f"train.batch_schedule: train.accumulate={train.accumulate} micro-batches do not divide the "
                    f"{portion.rows} rows of step {portion.step}; give every stage a multiple of {train.accumulate}"
                )

    @property
    def constant(self) -> bool:
        """Whether every step is given the same."""
        return len(self.portions) == 1

    @property
    def largest(self) -> Portion:
        """The one with the most tokens, and of these the longest rows."""
        return max(self.portions, key=lambda portion: (portion.tokens, portion.length))

    def at(self, step: int) -> Portion:
        """What a step is given."""
        return next(portion for portion in reversed(self.portions) if portion.step <= step)

    def tokens(self, steps: int | None = None) -> int:
        """Places for tokens in the first steps; None: in all of the run."""
        return sum(portion.tokens * count for portion, count in self._counted(steps))

    def mean(self, figure: Callable[[int], float], steps: int | None = None) -> float:
        """The mean over tokens of a figure that depends on the length, over the first steps; None: over all."""
        if self.constant or steps == 0:
            return figure(self.portions[0].length)
        total = sum(figure(portion.length) * portion.tokens * count for portion, count in self._counted(steps))
        return total / self.tokens(steps)

    def check(self, layout: "Layout", accumulate: int) -> None:
        """Refuse rows that do not divide over devices. Raises `ConfigError`."""
        for portion in self.portions:
            last = portion.rows == self.portions[-1].rows
            key = "train.batch_size" if last else f"train.batch_schedule, from step {portion.step}"
            layout.check_batch(portion.rows, accumulate, key)

    def logged(self, step: int) -> dict[str, int]:
        """What a row of `metrics.jsonl` says of a step's portion where not all are the same."""
        rows, length = self.at(step).batch
        return {} if self.constant else {"batch_size": rows, "sequence_length": length}

    def _counted(self, steps: int | None) -> Iterator[tuple[Portion, int]]:
        """Each portion, and how many of the first steps have it."""
        steps = self.steps if steps is None else steps
        ends = [portion.step for portion in self.portions[1:]] + [max(steps, self.portions[-1].step)]
        for portion, end in zip(self.portions, ends, strict=True):
            yield portion, max(0, min(end, steps) - portion.step)

    def batches(
        self,
        data: Data,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        skipped_rows: int = 0,
    ) -> Iterator[Batch]:
        """The batch of each step from `start_step` on, of which this process gets its part; see `Data.train_batches`.

        Rows are those so far behind the ones that the steps before leave (see `training.rollback`).
        What compiles another program is announced in the log.
        """
        read = data.train_batches(self.sizes.behind(skipped_rows), start_step, process_index, process_count)
        return read if self.constant else self._cut(read, start_step)

    def _cut(self, read: BatchIterator, step: int) -> Iterator[Batch]:
        before = None
        for batch in read:
            portion = self.at(step)
            if portion.batch != before:
                rows, length = before = portion.batch
                log.info("from step %d on: %d rows of %d tokens (another program to compile)", step, rows, length)
            yield cut(batch, portion.length)
            step += 1


def trained_on(batch: Batch) -> Batch:
    """The arrays of a batch that a step reads."""
    return {name: array for name, array in batch.items() if name != "target_bytes"}


def cut(batch: Batch, length: int) -> Batch:
    """Rows in pieces of `length` tokens, ``[rows, time]`` → ``[rows * time / length, length]``, as if packed so.

    What a piece holds of a document is a segment of its own, with positions from 0.
    """
    if batch["tokens"].shape[1] == length:
        return batch
    pieces = {name: array.reshape(-1, length) for name, array in batch.items()}
    ids, places = pieces["segment_ids"], np.arange(length, dtype=np.int32)
    begins = np.ones(ids.shape, bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    real = ids != 0
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    pieces["segment_ids"] = np.where(real, np.cumsum(begins & real, axis=1), 0).astype(np.int32)
    pieces["positions"] = np.where(real, places - starts, 0).astype(np.int32)
    return pieces


def _stages(
    key: str, schedule: Sequence[StageSpec] | GrowthSpec | None, last: int, steps: int
) -> list[tuple[int, int]]:
    """(First step, size) of every stage and of what follows them. Raises `ConfigError`."""
    if isinstance(schedule, GrowthSpec):
        sizes, end = schedule.sizes(last), _step(f"{key}.until", schedule.until, steps)
        if not sizes:
            raise ConfigError(f"{key}.start: {schedule.start} does not grow to {last}, the last; at most {last - 1}")
        if end < len(sizes):
            raise ConfigError(
                f"{key}.until: {end} steps are too few for the {len(sizes)} sizes before {last}; at least {len(sizes)}"
            )
        ends = [end * number // len(sizes) for number in range(1, len(sizes) + 1)]
    else:
        schedule = schedule or ()
        sizes = [stage.size for stage in schedule]
        ends = [_step(f"{key}[{index}].until", stage.until, steps) for index, stage in enumerate(schedule)]
        for index, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end <= before:
                raise ConfigError(f"{key}[{index}].until: step {end}, but what is before it ends at step {before}")
    return list(zip([0, *ends], [*sizes, last], strict=True))


def _step(key: str, duration: int | float, steps: int) -> int:
    end = steps_of(duration, steps)
    if end >= steps:
        raise ConfigError(f"{key}: step {end}, but the run ends at step {steps}; at most {steps - 1}")
    return end


def _at(stages: Sequence[tuple[int, int]], step: int) -> int:
    return next(size for first, size in reversed(stages) if first <= step)
