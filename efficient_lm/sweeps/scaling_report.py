"""Scaling fits of several architectures as plain values: coefficients with bands, and curves to be drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.profiles import IsoflopFit, fit_profiles
from efficient_lm.sweeps.scaling import BOOTSTRAP, Bootstrap, ParametricFit, Point, fit_parametric

PLACES = 48
"""Of a curve."""
BEYOND = 10.0
"""How many times the largest budget the frontier is drawn to."""


def scaling(runs: Mapping[str, Sequence[Point]], bootstrap: Bootstrap = BOOTSTRAP) -> dict[str, Any]:
    """Both fits of every architecture, for JSON.

    Returns:
        By name ``{"isoflop": ..., "parametric": ..., "curves": ...}`` (see `IsoflopFit.as_dict`,
        `ParametricFit.as_dict`, `profile_curves`, `frontier`); where the runs do not suffice for a fit, it is
        ``{"fault": why}`` and has no curves.
    """
    found = {}
    for name, points in runs.items():
        isoflop, parametric = _or_fault(fit_profiles, points, bootstrap), _or_fault(fit_parametric, points, bootstrap)
        curves: dict[str, Any] = {}
        if isinstance(isoflop, IsoflopFit):
            curves |= {"profiles": profile_curves(isoflop), "laws": law_curves(isoflop)}
        if isinstance(parametric, ParametricFit):
            curves["frontier"] = frontier(parametric)
        plain = {"isoflop": isoflop, "parametric": parametric}
        plain = {key: fit if isinstance(fit, dict) else fit.as_dict() for key, fit in plain.items()}
        found[name] = {**plain, "curves": curves}
    return found


def profile_curves(fit: IsoflopFit) -> list[dict[str, Any]]:
    """Of each budget: `flops`, and lists `parameters`, `loss`, `low` and `high`, from the least size to the largest."""
    found = []
    for profile in fit.profiles:
        sizes = [point.parameters for point in profile.points]
        grid = np.geomspace(min(sizes), max(sizes), PLACES)
        drawn = (each.loss(grid) for each in profile.drawn)
        curve = _banded(profile.parabola.loss(grid), drawn, fit.bootstrap)
        found.append({"flops": profile.flops, "parameters": grid.tolist(), **curve})
    return found


def law_curves(fit: IsoflopFit) -> dict[str, dict[str, Any]]:
    """Of `parameters` and `tokens`: lists `flops`, `value`, `low` and `high`; none where no law was found."""
    grid = _budgets([profile.flops for profile in fit.profiles])
    return {
        name: {
            "flops": grid.tolist(),
            **_banded(law.at(grid), (each[name].at(grid) for each in fit.drawn), fit.bootstrap, "value"),
        }
        for name, law in fit.laws.items()
    }


def frontier(fit: ParametricFit) -> dict[str, Any]:
    """The best run of each budget: `flops`, and for `parameters`, `tokens` and `loss` lists of value, low and high."""
    grid = _budgets([point.flops for point in fit.points])
    product = grid / fit.flops_per_product

    def best(coefficients: Any) -> dict[str, np.ndarray]:
        sizes, tokens = coefficients.optimal(product)
        return {"parameters": sizes, "tokens": tokens, "loss": coefficients.loss(sizes, tokens)}

    drawn, found = [best(each) for each in fit.drawn], best(fit.coefficients)
    bands = {
        name: _banded(curve, (each[name] for each in drawn), fit.bootstrap, "value") for name, curve in found.items()
    }
    return {"flops": grid.tolist(), **bands}


def _or_fault(fit: Callable[..., Any], points: Sequence[Point], bootstrap: Bootstrap) -> Any:
    try:
        return fit(points, bootstrap)
    except ConfigError as error:
        return {"fault": str(error)}


def _budgets(flops: Sequence[float]) -> np.ndarray:
    return np.geomspace(min(flops), BEYOND * max(flops), PLACES)


def _banded(
    curve: np.ndarray, drawn: Iterable[np.ndarray], bootstrap: Bootstrap, name: str = "loss"
) -> dict[str, list[float]]:
    stacked = np.stack([curve, *drawn])[1:]
    if not len(stacked):
        return {name: curve.tolist(), "low": curve.tolist(), "high": curve.tolist()}
    low, high = np.quantile(stacked, [(1 - bootstrap.level) / 2, (1 + bootstrap.level) / 2], axis=0)
    return {name: curve.tolist(), "low": low.tolist(), "high": high.tolist()}
