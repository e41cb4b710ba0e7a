"""What runs differ in, and which of them are one arm: alike but for the learning rate and the seed."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from efficient_lm.pages.chart import Measure
from efficient_lm.pages.palette import Style, style
from efficient_lm.sweeps.report.measures import QUALITY
from efficient_lm.sweeps.report.runs import RATE, Run

IDENTITY = ("run", "tracker")
"""Sections of a config that say which run it is, and not what it does."""
SIZED = ("isoflop", "budget")
"""Axes whose values are names of sizes: arms that differ in them alone are a family, as with numbers."""
TUNED = (RATE, "run.seed", "learning_rate", "seed")
"""Keys and axes that do not make an arm: over rates the best is taken, over seeds the mean."""
MOST = 12
"""Of arms in a legend; more than that are drawn by family."""

Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Setting:
    """The runs of an arm with one learning rate: a run for each seed.

    Attributes:
        rate: None if the runs do not say.
    """

    rate: float | None
    runs: tuple[Run, ...]

    def values(self, name: str) -> list[float]:
        """A figure of the runs that ended, and know it."""
        return [run.figures[name] for run in self.runs if run.ended and name in run.figures]

    def mean(self, name: str) -> float | None:
        """Of that figure, over seeds."""
        values = self.values(name)
        return float(np.mean(values)) if values else None

    @cached_property
    def sizes(self) -> dict[str, "Setting"]:
        """The models nested in those of the runs that ended, by what they are called, the smallest first."""
        ended = [run for run in self.runs if run.ended]
        names = dict.fromkeys(name for run in ended for name in run.sizes)
        parts = {name: [replace(run, figures=run.sizes[name]) for run in ended if name in run.sizes] for name in names}
        return {name: Setting(self.rate, tuple(runs)) for name, runs in parts.items()}


@dataclass(frozen=True)
class Arm:
    """Runs that differ in learning rate and seed alone.

    Attributes:
        label: unique among the arms.
        family: of arms that differ in numbers alone (widths, sizes of states), the same.
        choices: axis → value, for tables.
    """

    label: str
    family: str
    choices: Mapping[str, Any]
    runs: tuple[Run, ...]

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """By learning rate, the smallest first."""
        rates = sorted({run.learning_rate for run in self.runs}, key=lambda rate: (rate is None, rate or 0))
        return tuple(Setting(rate, tuple(run for run in self.runs if run.learning_rate == rate)) for rate in rates)

    def best(self, measure: Measure) -> Setting | None:
        """The setting with the best mean; None if no run that ended knows it."""
        sign = -1 if measure.more else 1
        scored = [(sign * mean, place) for place, each in enumerate(self.settings)
                  if (mean := each.mean(measure.name)) is not None]  # fmt: skip
        return self.settings[min(scored)[1]] if scored else None


@dataclass(frozen=True)
class Arms:
    """All arms.

    Attributes:
        axes: names of what they differ in.
        quality: how good they are, what decides first.
    """

    arms: tuple[Arm, ...]
    axes: tuple[str, ...]
    quality: tuple[Measure, ...] = QUALITY

    def best(self, arm: Arm) -> Setting | None:
        """The arm's best learning rate by the first measure of quality that it knows."""
        return next((setting for measure in self.quality if (setting := arm.best(measure)) is not None), None)

    @cached_property
    def legend(self) -> dict[str, Style]:
        """Groups in order: what differs in one axis alone has one colour."""
        first = {self.group(arm): arm for arm in reversed(self.arms)}
        groups = list(dict.fromkeys(self.group(arm) for arm in self.arms))
        return _styles({name: _words(first[name].choices) for name in groups})

    @cached_property
    def families(self) -> dict[str, Style]:
        """Families in order, in the same way."""
        first = {arm.family: arm for arm in reversed(self.arms)}
        return _styles({name: _words(first[name].choices) for name in dict.fromkeys(arm.family for arm in self.arms)})

    def group(self, arm: Arm) -> str:
        """What a legend calls an arm."""
        return arm.label if len(self.arms) <= MOST else arm.family


def arms_of(runs: Sequence[Run], quality: tuple[Measure, ...] = QUALITY) -> Arms:
    """The arms of runs: by the choices of their sweeps, otherwise by what their configs differ in."""
    chosen = [_choices(run, _named(runs)) for run in runs]
    plain = [place for place, choices in enumerate(chosen) if choices is None and runs[place].config]
    derived, names = _derived([runs[place] for place in plain])
    # What differs in nothing that can be read is told by its name.
    keys = [
        ((NAME, run.name),) if choices is None else _key(choices) for run, choices in zip(runs, chosen, strict=True)
    ]
    for place, key in zip(plain, derived, strict=True):
        keys[place] = key
    members: dict[Key, list[Run]] = {}
    for key, run in zip(keys, runs, strict=True):
        members.setdefault(key, []).append(run)
    axes = tuple(dict.fromkeys(name for key in members for name, _ in key if name != NAME))
    labels = _unique([names.get(key) or label(key) for key in members])
    arms = [
        Arm(text, _family(key, text), dict(key), tuple(found))
        for text, (key, found) in zip(labels, members.items(), strict=True)
    ]
    return Arms(tuple(sorted(arms, key=lambda arm: [natural(value) for value in arm.choices.values()])), axes, quality)


NAME = "run"
"""The axis of runs that no axis tells apart."""


def _named(runs: Sequence[Run]) -> bool:
    """Whether arms are told apart by their sweep, too."""
    return len({run.sweep for run in runs if run.sweep}) > 1


def _choices(run: Run, named: bool) -> dict[str, Any] | None:
    if run.choices is None:
        return None
    sweep = {"sweep": run.sweep} if named else {}
    return sweep | {name: value for name, value in run.choices.items() if name not in TUNED}


def _derived(runs: Sequence[Run]) -> tuple[list[Key], dict[Key, str]]:
    """Keys of runs by their configs, and labels where the runs' own names are the better ones."""
    differing = {key for key in differences([run.config for run in runs]) if key not in TUNED}
    by_config: dict[Key, list[int]] = {}
    for place, run in enumerate(runs):
        by_config.setdefault(tuple((key, _hashable(run.config.get(key))) for key in sorted(differing)), []).append(
            place
        )
    groups = list(by_config.items())
    own_names = [runs[places[0]].name for _, places in groups]
    alone = all(len(places) == 1 for _, places in groups) and len(set(own_names)) == len(own_names)
    short = _telling([dict(key) for key, _ in groups])
    keys: list[Key] = [()] * len(runs)
    names: dict[Key, str] = {}
    for number, (whole, places) in enumerate(groups):
        values = dict(whole)
        key: Key = tuple((name, values[name]) for name in short)
        if not differing or alone:
            key = ((NAME, own_names[number]), *key)
            names[key] = own_names[number]
        for place in places:
            keys[place] = key
    return keys, names


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values are not the same in all configs, without those that only say which run it is."""
    read = [config for config in configs if config]
    keys = dict.fromkeys(key for config in read for key in config)
    found = [
        key
        for key in keys
        if (key.split(".")[0] not in IDENTITY or key == "run.seed")
        and len({_hashable(config.get(key, _ABSENT)) for config in read}) > 1
    ]
    # What all have, first kinds, says more than what comes with one kind and not with another.
    return sorted(found, key=lambda key: (not all(key in config for config in read), last(key) != "kind"))


def _telling(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Few of the keys, by which all points are told apart already: kinds of parts first, then short ones."""
    keys = sorted(points[0], key=lambda key: (last(key) != "kind", key.count("."), key)) if points else []
    chosen: list[str] = []

    def told(names: Iterable[str]) -> int:
        return len({tuple(point[name] for name in names) for point in points})

    while told(chosen) < len(points):
        chosen.append(max(keys, key=lambda key: (told([*chosen, key]), -keys.index(key))))
    return chosen


def _key(choices: Mapping[str, Any]) -> Key:
    return tuple((name, _hashable(value)) for name, value in choices.items())


def label(key: Key) -> str:
    """Values side by side; those that do not speak for themselves with the last part of their key."""
    return " · ".join(said(name, value) for name, value in key) or "all runs"


def said(name: str, value: Any) -> str:
    """A value, with its key where it is a number or the like."""
    telling = isinstance(value, str) and not _is_number(value) and len(value) > 1
    return value if telling else f"{last(name, 'kind')} {shown(value)}"


def shown(value: Any) -> str:
    """A value of a config as text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def last(name: str, but: str = "") -> str:
    """The last part of a dotted key; the one before it where that is `but`."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == but and len(parts) > 1 else parts[-1]


def _family(key: Key, text: str) -> str:
    """What an arm is called without its numbers."""
    kinds = tuple(_words(dict(key)).items())
    return label(kinds) if kinds else "all runs" if key else text


def _words(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Choices that are no numbers; the run's own name if there are none others."""
    words = {
        name: value
        for name, value in choices.items()
        if isinstance(value, str) and not _is_number(value) and last(name) not in SIZED
    }
    return {name: value for name, value in words.items() if name != NAME} or words


def _styles(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """Styles of groups by their choices: colours for the axis with most values, marks and dashes for all others."""
    values = {name: list(dict.fromkeys(choices.get(name) for choices in groups.values())) for name in
              dict.fromkeys(name for choices in groups.values() for name in choices)}  # fmt: skip
    if not values:
        return {name: style(place) for place, name in enumerate(groups)}
    first = max(values, key=lambda name: len(values[name]))
    rests = {group: tuple(choices.get(name) for name in values if name != first) for group, choices in groups.items()}
    others = list(dict.fromkeys(rests.values()))
    places = {group: (values[first].index(choices.get(first)), others.index(rests[group])) for group, choices in
              groups.items()}  # fmt: skip
    if len(set(places.values())) < len(groups):
        return {name: style(place) for place, name in enumerate(groups)}
    return {group: style(place, second, len(others)) for group, (place, second) in places.items()}


def _unique(labels: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for text in labels:
        seen[text] = seen.get(text, 0) + 1
        unique.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return unique


def natural(value: Any) -> tuple[int, float, str]:
    """What values are sorted by: numbers by their size, all else as text, in which numbers count by their size too."""
    padded = re.sub(r"\d+", lambda found: found[0].zfill(12), shown(value))
    return (0, float(value), "") if _is_number(value) else (1, 0.0, padded)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


_ABSENT = "\0"


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
