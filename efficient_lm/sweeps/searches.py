"""Which places of a sweep's axes are tried, and which runs are stopped early: specs over Optuna. Imports no jax."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Choice, Count, Listing, Natural, OneOf, Spec

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

LARGER_IS_BETTER = ("accuracy", "per_second", "goodput", "mfu")
"""Beginnings or ends of names of figures that are to be large, unless a direction is given."""


class Objective(Spec):
    """A figure of a run's `summary.json`, or one that is counted beforehand.

    Attributes:
        name: of the figure.
        direction: whether the least or the largest is best; None: known from the name.
    """

    name: Annotated[str, Field(min_length=1)]
    direction: Literal["minimize", "maximize"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def larger(self) -> bool:
        """Whether the largest is best."""
        if self.direction is not None:
            return self.direction == "maximize"
        return any(word in self.name for word in LARGER_IS_BETTER)

    @property
    def optuna(self) -> str:
        """The direction as Optuna has it."""
        return "maximize" if self.larger else "minimize"


class PrunerSpec(Choice, role="pruner"):
    """Which runs are stopped before their end, by how their metric compares with that of others at the same step."""

    def build(self, most_steps: int) -> "BasePruner":
        """Optuna's pruner, for runs of up to `most_steps` steps."""
        raise TypeError(f"{type(self).__name__} does not define build")


class NoPrunerSpec(PrunerSpec):
    """Every run goes to its end."""

    kind: Literal["none"] = "none"

    def build(self, most_steps: int) -> "BasePruner":
        from optuna.pruners import NopPruner

        return NopPruner()


class MedianPrunerSpec(PrunerSpec):
    """A run stops where its best so far is worse than the median of others at that step (Golovin et al., 2017).

    Attributes:
        startup: runs that are complete before any is stopped.
        warmup: steps before which none is stopped.
    """

    kind: Literal["median"] = "median"
    startup: Natural = 5
    warmup: Natural = 0

    def build(self, most_steps: int) -> "BasePruner":
        from optuna.pruners import MedianPruner

        return MedianPruner(self.startup, self.warmup)


class AshaPrunerSpec(PrunerSpec):
    """Asynchronous successive halving (Li et al., 2020): at each rung the best of `reduction` runs goes on.

    Attributes:
        least: steps up to the first rung; None: a hundredth of what the first complete run took.
        reduction: ratio between rungs, and of runs that go on.
    """

    kind: Literal["asha"] = "asha"
    least: Count | None = None
    reduction: Annotated[Count, Field(ge=2)] = 4

    def build(self, most_steps: int) -> "BasePruner":
        from optuna.pruners import SuccessiveHalvingPruner

        return SuccessiveHalvingPruner("auto" if self.least is None else self.least, self.reduction)


class HyperbandPrunerSpec(PrunerSpec):
    """Hyperband (Li et al., 2018): successive halving from several first rungs, runs divided among them.

    Attributes:
        least: steps up to the earliest of the first rungs.
        most: steps of the longest run; None: what the runs are composed to have.
        reduction: as of `asha`.
    """

    kind: Literal["hyperband"] = "hyperband"
    least: Count = 1
    most: Count | None = None
    reduction: Annotated[Count, Field(ge=2)] = 3

    def build(self, most_steps: int) -> "BasePruner":
        from optuna.pruners import HyperbandPruner

        return HyperbandPruner(self.least, self.most or most_steps, self.reduction)


class SearchSpec(Choice, role="search"):
    """Which places of the axes are tried.

    Attributes:
        objectives: what decides, instead of the sweep's `metric`; of several, none before the others.
        pruner: which runs are stopped early.
    """

    objectives: Listing[Objective] = ()
    pruner: OneOf[PrunerSpec] = NoPrunerSpec()

    @model_validator(mode="after")
    def _prunes_by_one(self) -> "SearchSpec":
        if self.prunes and len(self.objectives) > 1:
            raise ConfigError(
                f"search.pruner: {self.pruner.kind} compares runs by one objective, and there are "
                f"{len(self.objectives)}; leave it out, or keep one"
            )
        return self

    @property
    def prunes(self) -> bool:
        """Whether any run may be stopped early."""
        return not isinstance(self.pruner, NoPrunerSpec)

    @property
    def candidates(self) -> int | None:
        """How many places are drawn; None: every place there is."""
        return None

    def sampler(self, number: int) -> "BaseSampler":
        """What draws candidate `number`; by it and the runs before alone, so that a restart changes nothing."""
        raise TypeError(f"{type(self).__name__} does not define sampler")


class GridSearchSpec(SearchSpec):
    """Every place there is."""

    kind: Literal["grid"] = "grid"

    def sampler(self, number: int) -> "BaseSampler":
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=number)


class _Drawn(SearchSpec):
    """So many places.

    Attributes:
        trials: how many.
        seed: of what is drawn.
    """

    trials: Count
    seed: Natural = 0

    @property
    def candidates(self) -> int:
        return self.trials

    def _seed(self, number: int) -> int:
        return (self.seed * 1_000_003 + number) % (1 << 32)


class RandomSearchSpec(_Drawn):
    """Places drawn at random."""

    kind: Literal["random"] = "random"

    def sampler(self, number: int) -> "BaseSampler":
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=self._seed(number))


class TpeSearchSpec(_Drawn):
    """Tree-structured Parzen estimator (Bergstra et al., 2011; for several objectives Ozaki et al., 2022).

    Attributes:
        startup: places drawn at random before.
    """

    kind: Literal["tpe"] = "tpe"
    startup: Natural = 10

    def sampler(self, number: int) -> "BaseSampler":
        from optuna.samplers import TPESampler

        return TPESampler(seed=self._seed(number), n_startup_trials=self.startup)


class NsgaSearchSpec(_Drawn):
    """NSGA-II (Deb et al., 2002), an evolution towards the front of several objectives.

    Attributes:
        population: places of a generation.
    """

    kind: Literal["nsga2"] = "nsga2"
    population: Annotated[Count, Field(ge=2)] = 20

    def sampler(self, number: int) -> "BaseSampler":
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=self._seed(number), population_size=self.population)
