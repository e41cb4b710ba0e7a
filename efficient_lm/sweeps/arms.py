"""Axes → arms: every combination, with conditional axes, exclusions and seeds, each under a name. Imports no jax."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from efficient_lm.composition import ConfigRoots
from efficient_lm.errors import ConfigError, nearest
from efficient_lm.overrides import parse
from efficient_lm.sweeps.axes import Axis, Scalar, Value, axis_of_values
from efficient_lm.sweeps.config import BUDGET, SweepConfig

LONGEST_NAME = 100
Pick = Callable[[Axis], Iterable[Value]]


@dataclass(frozen=True)
class Candidate:
    """A place on the axes.

    Attributes:
        picked: axis and value, in order.
        base: overrides that its places bring besides those of the values.
    """

    picked: tuple[tuple[Axis, Value], ...] = ()
    base: tuple[str, ...] = ()

    @property
    def choices(self) -> dict[str, Scalar]:
        """Key → value."""
        return {key: choice for _, value in self.picked for key, choice in value.choices.items()}

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of its runs."""
        return (*self.base, *(text for text in self._texts if not text.startswith(BUDGET)))

    @property
    def budget(self) -> dict[str, Any]:
        """What axes say of the budget: ``budget.flops=1e13`` is no key of a run."""
        parsed = [parse(text) for text in self._texts if text.startswith(BUDGET)]
        return {override.key_or_group.removeprefix(BUDGET): override.value() for override in parsed}

    @property
    def _texts(self) -> tuple[str, ...]:
        return tuple(override for _, value in self.picked for override in value.overrides)

    @property
    def labels(self) -> dict[str, Scalar]:
        """Axis → label, of axes by their unique names."""
        return {axis.name: value.label for axis, value in self.picked}


@dataclass(frozen=True)
class Arm:
    """A run of the sweep.

    Attributes:
        name: unique in the sweep, and its folder in `runs`.
        choices: key → value.
        seed: of the run; None leaves it to the config.
        overrides: of `train`, without the name and folder of the run.
        labels: axis → label.
        budget: what axes say of the budget.
    """

    name: str
    choices: Mapping[str, Scalar]
    seed: int | None
    overrides: tuple[str, ...]
    labels: Mapping[str, Scalar]
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Axes that arms have for which something holds; of the first, all arms.

    Attributes:
        condition: axis key → values, of which an arm has one.
        axes: of such arms.
        base: overrides of such arms.
    """

    condition: Mapping[str, tuple[Any, ...]]
    axes: tuple[Axis, ...]
    base: tuple[str, ...]

    def holds(self, choices: Mapping[str, Any]) -> bool:
        """Whether it does for these choices."""
        return _matches(self.condition, choices)


@dataclass(frozen=True)
class Space:
    """All the places there are.

    Attributes:
        blocks: of axes, each conditional on those before.
        excluded: conditions of places that are left out.
        seeds: of each place; (None,) leaves the seed to the config.
    """

    blocks: tuple[Block, ...]
    excluded: tuple[Mapping[str, tuple[Any, ...]], ...]
    seeds: tuple[int | None, ...]

    @classmethod
    def of(cls, config: SweepConfig, axes: Sequence[Axis], roots: ConfigRoots) -> "Space":
        """Of a sweep. Raises `ConfigError` for conditions on what is no axis, and on values that an axis has not."""
        blocks = [Block({}, tuple(axes), config.base)]
        for number, when in enumerate(config.when):
            place = f"when.{number}"
            condition = _condition(when.condition, blocks, f"{place}.if")
            inner = [axis_of_values(key, given, roots, f"{place}.axes") for key, given in when.axes.items()]
            said = ", ".join(f"{key}={'|'.join(map(str, values))}" for key, values in condition.items())
            # Optuna takes one set of values for a name: a key may have others in other blocks.
            named = [replace(axis, name=f"{axis.name} [{said}]") for axis in inner]
            known = {key for axis in blocks[0].axes for key in axis.keys}
            taken = {axis.name for block in blocks for axis in block.axes}
            for axis in named:
                if axis.keys[0] in known or axis.name in taken:
                    raise ConfigError(f"{place}.axes.{axis.keys[0]}: is an axis of these arms already")
            for text in when.base:
                parse(text)
            blocks.append(Block(condition, tuple(named), when.base))
        excluded = tuple(_condition(given, blocks, f"exclude.{number}") for number, given in enumerate(config.exclude))
        seeds = tuple(range(config.seeds)) if isinstance(config.seeds, int) else config.seeds or (None,)
        return cls(tuple(blocks), excluded, seeds)

    @property
    def keys(self) -> list[str]:
        """Every key that some arm chooses, in order."""
        return list(dict.fromkeys(key for block in self.blocks for axis in block.axes for key in axis.keys))

    def walk(self, pick: Pick) -> Iterator[Candidate]:
        """Places that `pick` leaves: all combinations of the values it gives for each axis."""
        found = [Candidate()]
        for block in self.blocks:
            found = [longer for each in found for longer in _along(each, block, pick)]
        return (each for each in found if not self.excludes(each))

    def excludes(self, candidate: Candidate) -> bool:
        """Whether a place is left out."""
        return any(_matches(condition, candidate.choices) for condition in self.excluded)

    def grid(self) -> list[Candidate]:
        """Every place. Raises `ConfigError` for an interval, and where nothing is left."""
        for axis in (axis for block in self.blocks for axis in block.axes):
            if not axis.values:
                raise ConfigError(
                    f"{axis.name}: an interval has no end of values, and search.kind=grid takes each; list values, or "
                    "choose search.kind=tpe search.trials=20 (or random, nsga2)"
                )
        found = list(self.walk(lambda axis: axis.values))
        if not found:
            raise ConfigError("exclude: leaves no arm")
        return found

    def samples(self) -> list[Candidate]:
        """Places in which every value of every axis of all arms comes up, and both ends of every interval."""
        most = max((len(axis.ends) for block in self.blocks for axis in block.axes), default=1)
        found: dict[tuple[Any, ...], Candidate] = {}
        for turn in range(most):
            for each in self.walk(lambda axis, turn=turn: (axis.ends[turn % len(axis.ends)],)):
                found.setdefault((each.overrides, *each.budget.items()), each)
        return list(found.values())


def arms_of(candidates: Sequence[Candidate], seeds: Sequence[int | None]) -> list[list[Arm]]:
    """For each place, its arms: one for each seed, under names that tell all of them apart."""
    names = [_name(each.choices) for each in candidates]
    names = [
        name if names.count(name) == 1 and len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{number:03}"
        for number, name in enumerate(names)
    ]
    return [seeded(name, each, seeds) for name, each in zip(names, candidates, strict=True)]


def seeded(name: str, candidate: Candidate, seeds: Sequence[int | None]) -> list[Arm]:
    """The arms of one place."""
    found = []
    for seed in seeds:
        parts = [name] if name else []
        parts += [f"seed_{seed}"] if len(seeds) > 1 or not parts else []
        with_seed = candidate.overrides if seed is None else (*candidate.overrides, f"run.seed={seed}")
        arm = Arm("-".join(parts), candidate.choices, seed, with_seed, candidate.labels, candidate.budget)
        found.append(arm)
    return found


def _along(candidate: Candidate, block: Block, pick: Pick) -> Iterator[Candidate]:
    if not block.holds(candidate.choices):
        yield candidate
        return
    for values in itertools.product(*(tuple(pick(axis)) for axis in block.axes)):
        picked = tuple(zip(block.axes, values, strict=True))
        yield Candidate((*candidate.picked, *picked), (*candidate.base, *block.base))


def _condition(given: Mapping[str, Any], blocks: Sequence[Block], place: str) -> dict[str, tuple[Any, ...]]:
    known: dict[str, list[Any] | None] = {}
    for axis in (axis for block in blocks for axis in block.axes):
        for key in axis.keys:
            values = known.setdefault(key, [])
            known[key] = (
                None if axis.span is not None or values is None else values + [v.choices[key] for v in axis.values]
            )
    condition = {key: tuple(value) if isinstance(value, list | tuple) else (value,) for key, value in given.items()}
    for key, values in condition.items():
        if key not in known:
            raise ConfigError(f"{place}.{key}: no axis; {nearest(key, known)}")
        for value in values if known[key] is not None else ():
            if not any(_same(value, other) for other in known[key]):
                raise ConfigError(f"{place}.{key}: no arm has '{value}'; {nearest(value, known[key])}")
    return condition


def _matches(condition: Mapping[str, tuple[Any, ...]], choices: Mapping[str, Any]) -> bool:
    return all(
        key in choices and any(_same(value, choices[key]) for value in values) for key, values in condition.items()
    )


def _same(one: Any, other: Any) -> bool:
    return one == other or str(one) == str(other)


def _name(choices: Mapping[str, Scalar]) -> str:
    """``mamba2-learning_rate_0.001``: choices of configs by themselves, other values after the end of their keys."""
    ends = [key.split(".")[-1] for key in choices]
    parts = []
    for (key, value), end in zip(choices.items(), ends, strict=True):
        plain = isinstance(value, str) and "." not in key
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(shown if plain else f"{end if ends.count(end) == 1 else key}_{shown}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)).strip("_.-")
