"""Which arms there are, and how the trial of one begins: all known beforehand, or drawn one by one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.arms import Arm, Candidate, Space, seeded
from efficient_lm.sweeps.axes import Axis, Value
from efficient_lm.sweeps.checking import Checked, Checker, Question
from efficient_lm.sweeps.searches import SearchSpec
from efficient_lm.sweeps.study import Study

ATTEMPTS = 100
"""Places that are drawn for one that is not excluded."""
OUTCOME = ("reason", "status", "pruned_at", "restarts")
"""Facts of a trial that one which repeats it does not have."""


class Plan(Protocol):
    """The arms of a sweep, in order.

    A trial that `begin` has made knows everything about its run: `arm`, `choices`, `seed`, `overrides`, `figures`,
    `steps` and `memory` (bytes, or None) are among its attributes; and `reason`, if there is one why it cannot run.
    """

    names: Sequence[str]

    def known(self, name: str) -> Arm | None:
        """An arm that was not begun, if it is known what it will be."""
        ...

    def begin(self, study: Study, name: str, trials: Mapping[str, FrozenTrial]) -> FrozenTrial | None:
        """The running trial of an arm that this process has; None if it is not its turn yet."""
        ...


class Grid:
    """All arms, known and checked beforehand."""

    def __init__(self, arms: Sequence[Sequence[Arm]], checked: Sequence[Checked], candidates: Sequence[Candidate]):
        pairs = list(zip(arms, checked, strict=True))
        self._arms = {arm.name: (arm, found) for group, found in pairs for arm in group}
        self.names = list(self._arms)
        axes = {axis.name: axis for candidate in candidates for axis, _ in candidate.picked}
        self._distributions = {
            name: CategoricalDistribution([value.label for value in axis.values]) for name, axis in axes.items()
        }

    def known(self, name: str) -> Arm:
        return self._arms[name][0]

    def begin(self, study: Study, name: str, trials: Mapping[str, FrozenTrial]) -> FrozenTrial:
        arm, found = self._arms[name]
        return study.begin(arm.labels, {key: self._distributions[key] for key in arm.labels}, facts(arm, found))


class Drawn:
    """Arms that a search draws, each when its turn comes.

    Args:
        question: what is asked of each place, but for its overrides.
        limit_bytes: of memory that a run may have.
    """

    def __init__(
        self, space: Space, search: SearchSpec, checker: Checker, question: Question, limit_bytes: float | None
    ):
        self._space, self._search, self._checker = space, search, checker
        self._question, self._limit = question, limit_bytes
        several = len(space.seeds) > 1
        self._places = {
            f"trial_{number:03}" + (f"-seed_{seed}" if several else ""): (number, place)
            for number in range(search.candidates)
            for place, seed in enumerate(space.seeds)
        }
        self.names = list(self._places)

    def known(self, name: str) -> None:
        return None

    def begin(self, study: Study, name: str, trials: Mapping[str, FrozenTrial]) -> FrozenTrial | None:
        number, place = self._places[name]
        if place:
            first = trials.get(next(iter(other for other, (n, _) in self._places.items() if n == number)))
            return None if first is None else self._repeated(study, name, first, place)
        trial, candidate = self._draw(study, number)
        arm = seeded(f"trial_{number:03}", candidate, self._space.seeds)[0]
        return self._begun(study, trial, arm)

    def _repeated(self, study: Study, name: str, first: FrozenTrial, place: int) -> FrozenTrial:
        """The place of another seed once more."""
        told = {key: value for key, value in first.user_attrs.items() if key not in OUTCOME}
        before, seed = first.user_attrs["seed"], self._space.seeds[place]
        seeds = {f"run.seed={before}": f"run.seed={seed}"}
        overrides = [seeds.get(text, text) for text in told["overrides"]]
        return study.begin(
            first.params, first.distributions, {**told, "arm": name, "seed": seed, "overrides": overrides}
        )

    def _draw(self, study: Study, number: int) -> tuple[Trial, Candidate]:
        for attempt in range(ATTEMPTS):
            study.optuna.sampler = self._search.sampler(number + attempt * 7919)
            trial = study.optuna.ask()
            found = list(self._space.walk(lambda axis, trial=trial: (_suggested(trial, axis),)))
            if found:
                return trial, found[0]
            study.optuna.tell(trial, state=TrialState.FAIL)
        raise ConfigError(f"exclude: leaves no arm among {ATTEMPTS} that were drawn")

    def _begun(self, study: Study, trial: Trial, arm: Arm) -> FrozenTrial:
        found = next(iter(self._checker.check([self._question.of(arm)])))
        self._checker.rest()
        told = facts(arm, found) if isinstance(found, Checked) else facts(arm, None) | {"reason": str(found)}
        if self._limit is not None and (told["memory"] or 0) > self._limit:
            told["reason"] = too_large(told["memory"], self._limit)
        for key, value in told.items():
            if key != "arm":
                trial.set_user_attr(key, value)
        # The last: a trial with the name of an arm is whole.
        trial.set_user_attr("arm", arm.name)
        return study.trial(arm.name)


def again(study: Study, trial: FrozenTrial) -> FrozenTrial:
    """A running trial of the arm of one that failed."""
    told = {key: value for key, value in trial.user_attrs.items() if key not in OUTCOME}
    return study.begin(trial.params, trial.distributions, told)


def facts(arm: Arm, found: Checked | None) -> dict[str, Any]:
    """What a trial is to know of its run."""
    return {
        "choices": dict(arm.choices),
        "seed": arm.seed if arm.seed is not None or found is None else found.seed,
        "overrides": [*arm.overrides, *(found.overrides if found else ())],
        "figures": dict(found.figures) if found else {},
        "steps": found.steps if found else 0,
        "memory": found.memory_bytes if found else None,
        "arm": arm.name,
    }


def too_large(memory: float, limit: float) -> str:
    """Why a candidate is refused."""
    return (
        f"its step takes {memory / 1e9:.2f} GB, and {limit / 1e9:.2f} GB are there (launcher.memory): a smaller "
        "train.batch_size, a larger train.accumulate or model.remat=full takes less"
    )


def _suggested(trial: Trial, axis: Axis) -> Value:
    span = axis.span
    if span is None:
        label = trial.suggest_categorical(axis.name, [value.label for value in axis.values])
        return next(value for value in axis.values if value.label == label and type(value.label) is type(label))
    if span.whole:
        step = 1 if span.log or span.step is None else int(span.step)
        return axis.at(trial.suggest_int(axis.name, int(span.low), int(span.high), step=step, log=span.log))
    step = None if span.log else span.step
    return axis.at(trial.suggest_float(axis.name, span.low, span.high, step=step, log=span.log))
