"""The loss as a function of size and tokens: L(N, D) = E + A / N^α + B / D^β, fitted as by Hoffmann et al. 2022
(arXiv 2203.15556, approach 3): the Huber loss of log L, from several starts; bands come from a bootstrap.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from efficient_lm.errors import ConfigError

HUBER = 1e-3
"""Residual of log L beyond which a point counts linearly, as in the paper."""
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
"""Of the starts: for each pair of them the other three coefficients follow from linear least squares."""
STARTS = 6
LEAST_POINTS, LEAST_VALUES = 6, 3
DISTINCT = 0.02
"""By how much the logarithms of two sizes, or numbers of tokens, differ at least."""


class Point(NamedTuple):
    """A run that was trained to its end.

    Attributes:
        parameters, tokens: of the model, and trained on.
        flops: of its training.
        loss: what it reached, in nats.
    """

    parameters: float
    tokens: float
    flops: float
    loss: float

    @classmethod
    def of(cls, figures: Mapping[str, Any], loss: str = "val_loss", embeddings: bool = True) -> "Point":
        """From `parameters`, `tokens`, `training_flops` and a loss; without embeddings `embedding_parameters` too.

        Raises:
            ConfigError: a figure that is missing or no positive number.
        """
        left_out = 0 if embeddings else _positive(figures, "embedding_parameters")
        names = ("tokens", "training_flops", loss)
        return cls(_positive(figures, "parameters") - left_out, *(_positive(figures, name) for name in names))


def _positive(figures: Mapping[str, Any], name: str) -> float:
    value = figures.get(name)
    if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}: {value} of a run is nothing to fit a curve to; leave the run out")
    return float(value)


class Estimate(NamedTuple):
    """A figure, and the band in which `level` of the bootstrap's draws have it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How bands are drawn.

    Residuals are drawn anew rather than runs: a design of few sizes stays whole in every draw. They are made larger by
    the root of points over points less coefficients, for a fit leaves residuals smaller than the errors are.

    Attributes:
        draws: how many.
        level: share of them that a band holds.
        seed: of what is drawn.
    """

    draws: int = 200
    level: float = 0.9
    seed: int = 0

    def estimate(self, value: float, drawn: Iterable[float]) -> Estimate:
        """A figure with the band of what was drawn of it; draws that have none count for nothing."""
        found = np.asarray([number for number in drawn if np.isfinite(number)])
        if not len(found):
            return Estimate(value, float("nan"), float("nan"))
        low, high = np.quantile(found, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(value, float(low), float(high))


BOOTSTRAP = Bootstrap()


class Coefficients(NamedTuple):
    """Of ``L = E + A / N^alpha + B / D^beta``."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """At each size and number of tokens."""
        return self.E + self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta)

    def optimal(self, product: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Size and tokens of the least loss where their product is given (Hoffmann et al. 2022, eq. 4)."""
        total = self.alpha + self.beta
        size = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total) * np.power(product, self.beta / total)
        return size, product / size


@dataclass(frozen=True)
class ParametricFit:
    """What was fitted to the runs of one architecture.

    Attributes:
        coefficients: of the loss.
        drawn: those of each draw of the bootstrap.
        flops_per_product: FLOPs for a parameter and a token, the runs' geometric mean (about 6 for large models).
        points: the runs.
        bootstrap: how bands were drawn.
    """

    coefficients: Coefficients
    drawn: tuple[Coefficients, ...]
    flops_per_product: float
    points: tuple[Point, ...]
    bootstrap: Bootstrap

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every coefficient, and the exponents of size and tokens as powers of FLOPs where the loss is least."""

        def figures(each: Coefficients) -> dict[str, float]:
            share = each.beta / (each.alpha + each.beta)
            return {**each._asdict(), "parameters_exponent": share, "tokens_exponent": 1 - share}

        drawn = [figures(each) for each in self.drawn]
        found = figures(self.coefficients)
        return {name: self.bootstrap.estimate(value, (one[name] for one in drawn)) for name, value in found.items()}

    @property
    def error(self) -> float:
        """Root mean square of the residuals of log L."""
        return float(np.sqrt(np.mean(_residuals(self.coefficients, self.points) ** 2)))

    def optimum(self, flops: float) -> dict[str, Estimate]:
        """`parameters`, `tokens` and `loss` of the best run of so many FLOPs."""

        def figures(each: Coefficients) -> dict[str, float]:
            size, tokens = each.optimal(flops / self.flops_per_product)
            return {"parameters": float(size), "tokens": float(tokens), "loss": float(each.loss(size, tokens))}

        drawn, found = [figures(each) for each in self.drawn], figures(self.coefficients)
        return {name: self.bootstrap.estimate(value, (one[name] for one in drawn)) for name, value in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        estimates = {name: estimate._asdict() for name, estimate in self.estimates.items()}
        return {
            **estimates,
            "flops_per_product": self.flops_per_product,
            "error": self.error,
            "points": len(self.points),
            "level": self.bootstrap.level,
        }


def fit_parametric(points: Sequence[Point], bootstrap: Bootstrap = BOOTSTRAP) -> ParametricFit:
    """The loss as a function of size and tokens.

    Raises:
        ConfigError: too few runs, sizes or numbers of tokens, or all of one compute budget.
    """
    points = tuple(points)
    _check(points)
    found = _fitted(points, _starts(points))
    logs, left = np.log([point.loss for point in points]), _residuals(found, points)
    left = (left - left.mean()) * np.sqrt(len(points) / max(len(points) - len(found), 1))
    random, drawn = np.random.default_rng(bootstrap.seed), []
    for _ in range(bootstrap.draws):
        losses = np.exp(logs - _residuals(found, points) + random.choice(left, len(points)))
        again = [point._replace(loss=loss) for point, loss in zip(points, losses, strict=True)]
        drawn.append(_fitted(again, [found, *_starts(again)[:1]]))
    products = [point.flops / (point.parameters * point.tokens) for point in points]
    return ParametricFit(found, tuple(drawn), float(np.exp(np.mean(np.log(products)))), points, bootstrap)


def _check(points: Sequence[Point]) -> None:
    if len(points) < LEAST_POINTS:
        raise ConfigError(
            f"{len(points)} runs: five coefficients are fitted to at least {LEAST_POINTS}; add sizes or budgets"
        )
    for name in ("parameters", "tokens"):
        count = distinct([getattr(point, name) for point in points])
        if count < LEAST_VALUES:
            raise ConfigError(f"{name}: {count} different values in all runs; at least {LEAST_VALUES} show an exponent")
    if distinct([point.flops for point in points]) < 2:
        raise ConfigError("flops: all runs have one budget, where size and tokens change together; add a second one")


def distinct(values: Sequence[float]) -> int:
    """How many values there are, those counted once that are nearly alike."""
    logs = np.sort(np.log(values))
    return 1 + int(np.sum(np.diff(logs) > DISTINCT))


def _logs(points: Sequence[Point]) -> np.ndarray:
    """log N, log D and log L, ``[points, 3]``."""
    return np.log([[point.parameters, point.tokens, point.loss] for point in points])


def _residuals(found: Coefficients, points: Sequence[Point]) -> np.ndarray:
    """log of the measured loss less that of the fitted one."""
    sizes, tokens, losses = np.exp(_logs(points)).T
    return np.log(losses) - np.log(found.loss(sizes, tokens))


def _starts(points: Sequence[Point]) -> list[Coefficients]:
    """The best of a grid of exponents: with these given, the loss is linear in the other coefficients."""
    sizes, tokens, losses = np.exp(_logs(points)).T
    found = []
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            terms = np.stack([np.ones_like(sizes), sizes**-alpha, tokens**-beta], 1)
            scale = terms.max(0)
            (E, A, B), error = nnls(terms / scale / losses[:, None], np.ones_like(losses))
            floor = 1e-3 * losses.min()
            values = np.maximum((E, A, B), floor) / scale
            found.append((error, Coefficients(*values, alpha, beta)))
    return [start for _, start in sorted(found, key=lambda each: each[0])[:STARTS]]


def _fitted(points: Sequence[Point], starts: Sequence[Coefficients]) -> Coefficients:
    logs = _logs(points)
    center = logs.mean(0)
    sizes, tokens, losses = (logs - center).T

    def terms(x: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = x
        return np.stack([np.full_like(sizes, e), a - alpha * sizes, b - beta * tokens], 1)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(x), axis=1) - losses

    def slopes(x: np.ndarray) -> np.ndarray:
        each = terms(x)
        shares = np.exp(each - np.logaddexp.reduce(each, axis=1)[:, None])
        return np.concatenate([shares, -shares[:, 1:2] * sizes[:, None], -shares[:, 2:] * tokens[:, None]], 1)

    # Centred, so that a coefficient and its exponent do not move together.
    n, d, level = center
    best = None
    for start in starts:
        E, A, B, alpha, beta = start
        x = [np.log(E) - level, np.log(A) - alpha * n - level, np.log(B) - beta * d - level, alpha, beta]
        bounds = ([-20.0] * 3 + [1e-3] * 2, [5.0] * 3 + [5.0] * 2)
        inside = np.clip(x, *(np.asarray(bound) for bound in bounds))
        found = least_squares(residuals, inside, slopes, bounds, loss="huber", f_scale=HUBER, x_scale=1.0, max_nfev=400)
        best = found if best is None or found.cost < best.cost else best
    e, a, b, alpha, beta = (float(value) for value in best.x)
    E, A, B = np.exp([e + level, a + alpha * n + level, b + beta * d + level])
    return Coefficients(float(E), float(A), float(B), alpha, beta)
