"""Candidates are composed, resized to the budget and checked before anything runs, by a process that imports jax.

The sweep itself lives as long as its runs and needs none of that: neither the memory, nor an accelerator held open.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeps.arms import Arm

COUNTED = ("parameters", "flops_per_token", "training_flops", "cache_bytes")
"""Figures that follow from a config; the second of the forward pass, the last for one sequence of training."""
IDLE_SECONDS = 2.0
"""In which a process that has nothing to do ends."""
REPORTED = ("step", "tokens", "seconds")
"""Further figures of every run."""


class Known(NamedTuple):
    """What takes long to find out of a candidate, or would be another thing if it was measured again.

    Attributes:
        overrides: that bring it within the budget.
        columns: what the budget's table says of it.
        memory_bytes: the most that its run has, on a device if there are accelerators; None: not asked.
        device_bytes: memory of an accelerator of this machine; None where there is none.
    """

    overrides: tuple[str, ...] = ()
    columns: dict[str, Any] = {}
    memory_bytes: int | None = None
    device_bytes: int | None = None


class Question(NamedTuple):
    """What is asked of a candidate.

    Attributes:
        overrides: of its runs.
        config_dirs: folders of further groups and choices.
        budget: as `sweeps.budgets.BudgetSpec` has it; None leaves the candidate as it is.
        memory: whether its step is compiled to know its memory.
        remote: whether it runs elsewhere: what this machine has is then beside the point.
        figures: that will be looked at.
        prunes: whether it may be stopped early, which takes evaluations.
        group: of the runs, for a tracker that has groups.
        known: what an earlier answer said; None: not asked before.
    """

    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...] = ()
    budget: dict[str, Any] | None = None
    memory: bool = False
    remote: bool = False
    figures: tuple[str, ...] = ()
    prunes: bool = False
    group: str = ""
    known: Known | None = None

    def of(self, arm: Arm, known: Known | None = None) -> "Question":
        """The question about an arm."""
        budget = {**(self.budget or {}), **arm.budget}
        return self._replace(overrides=arm.overrides, budget=budget or None, known=known)


@dataclass(frozen=True)
class Checked:
    """What is known of a candidate before it runs.

    Attributes:
        overrides: that bring its runs into their group.
        figures: by name, those of `COUNTED`.
        seed, steps: of its runs.
        config: plain values, without what tells its runs apart.
    """

    overrides: tuple[str, ...]
    figures: dict[str, float]
    seed: int
    steps: int
    config: dict[str, Any]
    known: Known = Known()


def check(question: Question) -> Checked:
    """Compose a candidate and look at it.

    Raises:
        UserError: whatever `train` would say before its first step; a budget it cannot have; a figure it will not have.
    """
    from efficient_lm.config import load_run_config
    from efficient_lm.training.setup import prepare

    known = question.known or Known(*_fitted(question))
    config = load_run_config([*question.overrides, *known.overrides], question.config_dirs)
    grouped = _grouping(config.dump()["tracker"], question.group)
    setup = None if question.remote else prepare(config)
    whole = _composed(config) if setup is None else setup.config
    figures = _figures(whole, question.figures)
    if question.prunes and config.train.evaluate_every is None:
        raise ConfigError("search.pruner: compares runs while they train; train.evaluate_every says when, and is null")
    if question.memory and known.memory_bytes is None and setup is not None:
        memory, device = _memory(setup)
        known = known._replace(memory_bytes=memory, device_bytes=device)
    plain = {key: value for key, value in whole.dump().items() if key not in ("run", "tracker")}
    return Checked(tuple(grouped), figures, config.run.seed, config.train.steps, plain, known)


def _fitted(question: Question) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Overrides that bring a candidate within its budget, and what the budget's table says of it."""
    if question.budget is None:
        return (), {}
    from efficient_lm.composition import compose
    from efficient_lm.sweeps.budgets import BudgetSpec, fit
    from efficient_lm.validation import validate

    values = compose("train", question.overrides, question.config_dirs).values
    found = fit(values, validate(BudgetSpec, question.budget, "budget"))
    return tuple(found.overrides), dict(found.columns)


def _composed(config: Any) -> Any:
    """The config with what follows from tokenizer and width filled in, checked as far as another machine can."""
    from efficient_lm.training.setup import with_factors, with_vocabulary

    config = with_factors(with_vocabulary(config, config.tokenizer.build()))
    config.model.build().check_length(config.train.sequence_length, "train.sequence_length")
    return config


def _figures(config: Any, wanted: Sequence[str]) -> dict[str, float]:
    from efficient_lm.errors import nearest
    from efficient_lm.models.parameters import count_parameters
    from efficient_lm.training.accounting import cache_bytes, run_flops_per_token
    from efficient_lm.training.portions import Portions

    measured = ("loss", "bits_per_byte") if config.data.reads_text else ("loss", "accuracy", "sequence_accuracy")
    known = [*COUNTED, *REPORTED, *(f"val_{name}" for name in measured)]
    for name in wanted:
        # Models inside a nested one have figures of their own, val_loss_half.
        if name not in known and not any(name.startswith(f"val_{inner}_") for inner in measured):
            raise ConfigError(f"metric: runs of such data have no '{name}'; {nearest(name, known)}")
    model, length = config.model.build(), config.train.sequence_length
    figures = {
        "parameters": count_parameters(model.declarations),
        "flops_per_token": model.flops_per_token(length),
        "training_flops": run_flops_per_token(config, model) * Portions(config.train).tokens(),
    }
    if "cache_bytes" in wanted:
        figures["cache_bytes"] = cache_bytes(model, length, config.precision.dtype)
    return figures


def _grouping(tracker: dict[str, Any], group: str) -> list[str]:
    """Overrides that put a run into a group of its tracker, unless the config names one."""
    from efficient_lm.sweeps.axes import as_text

    trackers = {f"trackers.{name}.": inner for name, inner in tracker.get("trackers", {}).items()} or {"": tracker}
    wanting = [place for place, inner in trackers.items() if "group" in inner and inner["group"] is None]
    return [f"tracker.{place}group={as_text(group)}" for place in wanting if group]


def _memory(setup: Any) -> tuple[int, int | None]:
    """Bytes that a run has at most, and those of an accelerator.

    The step is compiled as the run will, which then finds it in the cache. Without an accelerator a run also has what a
    process has that has imported as much: this one, before it compiled anything.
    """
    import jax
    import psutil

    from efficient_lm.training.compiling import compiled_step
    from efficient_lm.training.machines import here
    from kernels_pallas.ahead import TooLarge

    resident = _RESIDENT.setdefault("bytes", psutil.Process().memory_info().rss)
    try:
        arrays = compiled_step(setup, here()).peak_bytes
    except TooLarge as error:
        arrays = error.needed
    device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return arrays + (resident if device is None else 0), device


_RESIDENT: dict[str, int] = {}
"""Memory of this process when it was first asked for that of a run."""


class Checker:
    """A process that checks candidates; it starts with the first question, and again if questions come after `rest`."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None
        self._lasting = True

    def check(self, questions: Iterable[Question]) -> Iterator[Checked | UserError]:
        """What is found of each, in order."""
        for question in questions:
            if self._connection is None:
                self._start()
            try:
                self._connection.send(question)
                answer = self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                status = self._process.exitcode
                self.close()
                yield ConfigError(f"could not be checked: the process that did so ended (exit status {status})")
                continue
            if isinstance(answer, Checked):
                self._lasting = answer.known.device_bytes is None
            elif not isinstance(answer, UserError):
                raise answer
            yield answer

    def rest(self) -> None:
        """Runs begin: an accelerator that the process has opened is theirs."""
        if not self._lasting:
            self.close()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.join(IDLE_SECONDS)
            # It is still at something that nobody waits for any more.
            self._process.terminate()
            self._process.join()
            self._connection = self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection: Connection) -> None:
    """Answer until the other side is gone."""
    import os

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = check(question)
        except Exception as error:
            answer = error
        connection.send(answer)
