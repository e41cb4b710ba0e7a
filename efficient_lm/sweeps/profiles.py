"""IsoFLOP profiles: at each compute budget a parabola in log N whose lowest point is the best size, and power laws
through the best sizes (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.scaling import BOOTSTRAP, Bootstrap, Estimate, Point, distinct

SAME_BUDGET = 1.15
"""Ratio of FLOPs below which neighbours are of one budget."""
LEAST_SIZES = 4


@dataclass(frozen=True)
class Parabola:
    """The loss of one budget, ``bend * x^2 + slope * x + level`` with ``x = log N - center``.

    Attributes:
        bend, slope, level: coefficients; there is a best size where `bend` is positive.
        center: mean of log N.
        tokens_slope, tokens_level: of log D over x, by least squares.
    """

    bend: float
    slope: float
    level: float
    center: float
    tokens_slope: float
    tokens_level: float

    @classmethod
    def of(cls, points: Sequence[Point], losses: np.ndarray) -> "Parabola":
        """Through `losses`, which may be others than those of the points."""
        logs = np.log([point.parameters for point in points])
        center = float(logs.mean())
        bend, slope, level = np.polyfit(logs - center, losses, 2)
        tokens = np.polyfit(logs - center, np.log([point.tokens for point in points]), 1)
        return cls(float(bend), float(slope), float(level), center, *map(float, tokens))

    def loss(self, parameters: np.ndarray | float) -> np.ndarray:
        """At each size."""
        return np.polyval([self.bend, self.slope, self.level], np.log(parameters) - self.center)

    @property
    def best(self) -> dict[str, float]:
        """`parameters`, `tokens` and `loss` of the lowest point; not a number where there is none."""
        if self.bend <= 0:
            return dict.fromkeys(("parameters", "tokens", "loss"), float("nan"))
        x = -self.slope / (2 * self.bend)
        size, tokens = np.exp(np.clip([self.center + x, self.tokens_slope * x + self.tokens_level], -700, 700))
        return {"parameters": float(size), "tokens": float(tokens), "loss": float(self.loss(size))}


@dataclass(frozen=True)
class Profile:
    """The runs of one budget.

    Attributes:
        flops: their geometric mean.
        points: by size.
        parabola: through their losses.
        drawn: of each draw of the bootstrap.
        bootstrap: how bands were drawn.
    """

    flops: float
    points: tuple[Point, ...]
    parabola: Parabola
    drawn: tuple[Parabola, ...]
    bootstrap: Bootstrap

    @cached_property
    def best(self) -> dict[str, Estimate]:
        """`parameters`, `tokens` and `loss` of the best run of this budget."""
        drawn, found = [each.best for each in self.drawn], self.parabola.best
        return {name: self.bootstrap.estimate(value, (one[name] for one in drawn)) for name, value in found.items()}

    @property
    def inside(self) -> bool:
        """Whether the best size is between the sizes that were tried: outside it is a guess."""
        sizes, best = [point.parameters for point in self.points], self.parabola.best["parameters"]
        return bool(min(sizes) <= best <= max(sizes))


@dataclass(frozen=True)
class PowerLaw:
    """``exp(log_factor) * flops^exponent``: a steep law through common budgets has a factor that no float holds."""

    log_factor: float
    exponent: float

    @classmethod
    def of(cls, flops: Sequence[float], values: Sequence[float]) -> "PowerLaw":
        """Through values, by least squares of their logarithms."""
        exponent, log_factor = np.polyfit(np.log(flops), np.log(values), 1)
        return cls(float(log_factor), float(exponent))

    def at(self, flops: np.ndarray | float) -> np.ndarray:
        """The value at each budget; infinite where it is more than a float holds."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_factor + self.exponent * np.log(flops))


@dataclass(frozen=True)
class IsoflopFit:
    """The profiles of an architecture, and what they say of larger budgets.

    Attributes:
        profiles: by budget, ascending.
        laws: how the best `parameters` and `tokens` grow with FLOPs; none where fewer than two budgets have a best.
        drawn: the same of each draw of the bootstrap in which they could be told.
        bootstrap: how bands were drawn.
    """

    profiles: tuple[Profile, ...]
    laws: dict[str, PowerLaw]
    drawn: tuple[dict[str, PowerLaw], ...]
    bootstrap: Bootstrap

    @cached_property
    def exponents(self) -> dict[str, Estimate]:
        """Of the laws, with their bands."""
        return {
            name: self.bootstrap.estimate(law.exponent, (one[name].exponent for one in self.drawn))
            for name, law in self.laws.items()
        }

    def at(self, name: str, flops: float) -> Estimate:
        """The best `parameters` or `tokens` at a budget, by their law."""
        drawn = (float(one[name].at(flops)) for one in self.drawn)
        return self.bootstrap.estimate(float(self.laws[name].at(flops)), drawn)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what could not be told is null."""
        profiles = [
            {
                "flops": each.flops,
                "points": [point._asdict() for point in each.points],
                "inside": each.inside,
                "best": {name: _plain(estimate) for name, estimate in each.best.items()},
            }
            for each in self.profiles
        ]
        laws = {
            name: {"log_factor": law.log_factor, "exponent": _plain(self.exponents[name])}
            for name, law in self.laws.items()
        }
        return {"profiles": profiles, "laws": laws, "level": self.bootstrap.level}


def fit_profiles(points: Sequence[Point], bootstrap: Bootstrap = BOOTSTRAP) -> IsoflopFit:
    """The profiles of runs that were given few budgets.

    Raises:
        ConfigError: a budget with too few sizes.
    """
    groups = [group for group in by_budget(points)]
    for flops, group in groups:
        count = distinct([point.parameters for point in group])
        if count < LEAST_SIZES:
            raise ConfigError(
                f"flops={flops:.3g}: {count} sizes; a parabola and its band take at least {LEAST_SIZES}: add sizes, or "
                "leave the budget out"
            )
    if not groups:
        raise ConfigError("no runs to fit a profile to")
    losses = [np.asarray([point.loss for point in group]) for _, group in groups]
    found = [Parabola.of(group, values) for (_, group), values in zip(groups, losses, strict=True)]
    fitted = [each.loss([point.parameters for point in group]) for each, (_, group) in zip(found, groups, strict=True)]
    # One pool for all budgets: a few runs by themselves say little of their error.
    pool = np.concatenate(
        [
            (values - curve) * np.sqrt(len(values) / (len(values) - 3))
            for values, curve in zip(losses, fitted, strict=True)
        ]
    )
    random, draws = np.random.default_rng(bootstrap.seed), []
    for _ in range(bootstrap.draws):
        draws.append(
            [
                Parabola.of(group, curve + random.choice(pool, len(curve)))
                for (_, group), curve in zip(groups, fitted, strict=True)
            ]
        )
    profiles = tuple(
        Profile(flops, tuple(group), found[number], tuple(draw[number] for draw in draws), bootstrap)
        for number, (flops, group) in enumerate(groups)
    )
    budgets = [flops for flops, _ in groups]
    drawn = [laws for draw in draws if (laws := _laws(budgets, draw))]
    return IsoflopFit(profiles, _laws(budgets, found), tuple(drawn), bootstrap)


def by_budget(points: Sequence[Point]) -> list[tuple[float, list[Point]]]:
    """Runs of nearly the same FLOPs together, with the geometric mean of these; in each by size."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and point.flops <= SAME_BUDGET * groups[-1][-1].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        (float(np.exp(np.mean(np.log([point.flops for point in group])))), sorted(group, key=lambda p: p.parameters))
        for group in groups
    ]


def _laws(budgets: Sequence[float], parabolas: Sequence[Parabola]) -> dict[str, PowerLaw]:
    best = [(flops, each.best) for flops, each in zip(budgets, parabolas, strict=True) if each.bend > 0]
    if len(best) < 2:
        return {}
    flops = [flops for flops, _ in best]
    return {name: PowerLaw.of(flops, [each[name] for _, each in best]) for name in ("parameters", "tokens")}


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in estimate._asdict().items()}
