"""Candidates are composed, resized to the budget and checked before anything runs, by a process that imports jax.

The sweep itself lives as long as its runs and needs none of that: neither the memory, nor an accelerator held open.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.sweeps.arms import Arm

COUNTED = ("parameters", "flops_per_token", "training_flops", "cache_bytes")
"""Figures that follow from a config; the second of the forward pass, the last for one sequence of training."""
REPORTED = ("step", "tokens", "seconds")
"""Further figures of every run."""


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
    """

    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...] = ()
    budget: dict[str, Any] | None = None
    memory: bool = False
    remote: bool = False
    figures: tuple[str, ...] = ()
    prunes: bool = False
    group: str = ""

    def of(self, arm: Arm) -> "Question":
        """The question about an arm."""
        budget = {**(self.budget or {}), **arm.budget}
        return self._replace(overrides=arm.overrides, budget=budget or None)


@dataclass(frozen=True)
class Checked:
    """What is known of a candidate before it runs.

    Attributes:
        overrides: further ones, that bring it within the budget and its runs into their group.
        columns: what the budget's table says of it.
        figures: by name, those of `COUNTED`.
        seed, steps: of its runs.
        config: plain values, without what tells its runs apart.
        memory_bytes: the most that its run will have, on a device if there are accelerators; None: not asked.
        device_bytes: memory of an accelerator of this machine; None where there is none.
    """

    overrides: tuple[str, ...]
    columns: dict[str, Any]
    figures: dict[str, float]
    seed: int
    steps: int
    config: dict[str, Any] = field(repr=False)
    memory_bytes: int | None = None
    device_bytes: int | None = None


def check(question: Question) -> Checked:
    """Compose a candidate and look at it.

    Raises:
        UserError: whatever `train` would say before its first step; a budget it cannot have; a figure it will not have.
    """
    from efficient_lm.composition import compose
    from efficient_lm.config import load_run_config

    overrides, columns = list(question.overrides), {}
    if question.budget is not None:
        from efficient_lm.sweeps.budgets import BudgetSpec, fit
        from efficient_lm.validation import validate

        values = compose("train", overrides, question.config_dirs).values
        fitted = fit(values, validate(BudgetSpec, question.budget, "budget"))
        overrides, columns = [*overrides, *fitted.overrides], dict(fitted.columns)
    config = load_run_config(overrides, question.config_dirs)
    grouped = _grouping(config.dump()["tracker"], question.group)
    prepared = _prepared(config, question.remote)
    figures = _figures(prepared, question.figures)
    if question.prunes and config.train.evaluate_every is None:
        raise ConfigError("search.pruner: compares runs while they train; train.evaluate_every says when, and is null")
    memory, device = _memory(prepared) if question.memory else (None, None)
    plain = {key: value for key, value in prepared.dump().items() if key not in ("run", "tracker")}
    further = (*overrides[len(question.overrides) :], *grouped)
    run, train = config.run, config.train
    return Checked(further, columns, figures, run.seed, train.steps, plain, memory, device)


def _prepared(config: Any, remote: bool) -> Any:
    """The config with what follows from tokenizer and width filled in."""
    from efficient_lm.training.setup import prepare, with_factors, with_vocabulary

    if not remote:
        return prepare(config).config
    config = with_factors(with_vocabulary(config, config.tokenizer.build()))
    config.model.build().check_length(config.train.sequence_length, "train.sequence_length")
    return config


def _figures(config: Any, wanted: Sequence[str]) -> dict[str, float]:
    import jax

    from efficient_lm.errors import nearest
    from efficient_lm.models.parameters import count_parameters
    from efficient_lm.training.accounting import run_flops_per_token
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
        caches = jax.eval_shape(lambda: model.init_caches(1, length, config.precision.dtype))
        figures["cache_bytes"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    return figures


def _grouping(tracker: dict[str, Any], group: str) -> list[str]:
    """Overrides that put a run into a group of its tracker, unless the config names one."""
    from efficient_lm.sweeps.axes import as_text

    trackers = {f"trackers.{name}.": inner for name, inner in tracker.get("trackers", {}).items()} or {"": tracker}
    wanting = [place for place, inner in trackers.items() if "group" in inner and inner["group"] is None]
    return [f"tracker.{place}group={as_text(group)}" for place in wanting if group]


def _memory(config: Any) -> tuple[int, int | None]:
    """Bytes that a run has at most, by its compiled step, and those of an accelerator."""
    import jax

    from efficient_lm.training.accounting import plan

    found = plan(config)["bytes"]
    statistics = jax.local_devices()[0].memory_stats() or {}
    return sum(found[part] for part in ("parameters", "gradients", "optimizer", "activations")), statistics.get(
        "bytes_limit"
    )


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
            self._connection.send(question)
            try:
                answer = self._connection.recv()
            except EOFError:
                self._process.join()
                status = self._process.exitcode
                self.close()
                yield ConfigError(f"could not be checked: the process that did so ended (exit status {status})")
                continue
            if isinstance(answer, Checked):
                self._lasting = answer.device_bytes is None
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
