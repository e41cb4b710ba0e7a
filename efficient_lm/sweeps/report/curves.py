"""Curves of several runs put together: means over seeds, and the best of the learning rates wherever one stops."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from efficient_lm.sweeps.report.arms import Arm, Setting
from efficient_lm.sweeps.report.runs import Columns

GRID = 80
"""Points of an envelope."""


class Envelope(NamedTuple):
    """The best of an arm's learning rates along what is spent.

    Attributes:
        along: float64 ``[points]``.
        mean, low, high: over the seeds of the setting that is best there, float64 ``[points]``.
        rates: the learning rate of that setting.
    """

    along: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rates: list[float | None]


def envelope(arm: Arm, along: str, measure: str, more: bool = False) -> Envelope | None:
    """Of runs that ended; None if none has such a curve.

    Between the points of a curve values are on straight lines; where a run has not begun or is over it has none, and a
    setting counts only where all of its seeds have one.
    """
    settings = [(setting.rate, _curves(setting, along, measure)) for setting in arm.settings]
    settings = [(rate, curves) for rate, curves in settings if curves]
    if not settings:
        return None
    starts, ends = zip(*((x[0], x[-1]) for _, curves in settings for x, _ in curves), strict=True)
    grid = _grid(min(starts), max(ends))
    rows = [np.array([np.interp(grid, x, y, np.nan, np.nan) for x, y in curves]) for _, curves in settings]
    means = np.array([values.mean(0) for values in rows])
    known = ~np.isnan(means).all(0)
    if not known.any():
        return None
    best = np.nanargmin(-means[:, known] if more else means[:, known], 0)
    places = np.flatnonzero(known)
    chosen = [rows[setting][:, place] for setting, place in zip(best, places, strict=True)]
    return Envelope(
        grid[known],
        np.array([values.mean() for values in chosen]),
        np.array([values.min() for values in chosen]),
        np.array([values.max() for values in chosen]),
        [settings[setting][0] for setting in best],
    )


def _curves(setting: Setting, along: str, measure: str) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for run in setting.runs:
        for columns in (run.training, run.validation):
            x, y = (spent(columns, name, run.figures.get("training_flops_per_token")) for name in (along, measure))
            if not run.ended or x is None or y is None:
                continue
            usable = ~(np.isnan(x) | np.isnan(y))
            if usable.any():
                order = np.argsort(x[usable], kind="stable")
                found.append((x[usable][order], y[usable][order]))
    return found


def spent(columns: Columns, name: str, flops_per_token: float | None) -> np.ndarray | None:
    """A column; FLOPs are tokens times those of a token, where these are known."""
    if name == "flops" and flops_per_token is not None and "tokens" in columns:
        return columns["tokens"] * flops_per_token
    return columns.get(name)


def _grid(start: float, end: float) -> np.ndarray:
    """Half of the points evenly, half of them denser where training begins."""
    even = np.linspace(start, end, GRID // 2)
    if start <= 0 or end <= start:
        return np.unique(even)
    return np.unique(np.concatenate([even, np.geomspace(start, end, GRID // 2).clip(start, end)]))


def listed(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """For JSON: None in place of what is no number."""
    return [None if np.isnan(value) else float(value) for value in np.asarray(values, float)]
