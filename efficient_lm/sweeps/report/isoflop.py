"""IsoFLOP profiles of a report: where runs were given few budgets of compute and several sizes at each."""

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.pages.chart import HIGH, LOW, Chart, Measure, Series
from efficient_lm.pages.palette import Style, style
from efficient_lm.sweeps.profiles import LEAST_SIZES, by_budget
from efficient_lm.sweeps.report.arms import Arms
from efficient_lm.sweeps.report.charts import Rows, counted
from efficient_lm.sweeps.report.measures import BY_NAME
from efficient_lm.sweeps.scaling import Bootstrap, Point, distinct
from efficient_lm.sweeps.scaling_report import scaling

LOSS = BY_NAME["val_loss"]
SIZE = Measure("parameters", "parameters", log=True)
FLOPS = Measure("flops", "training FLOPs", log=True)
LAWS = (
    Measure("parameters", "parameters of the best run", log=True),
    Measure("tokens", "tokens of the best run", log=True),
    Measure("loss", "loss of the best run (nats per token)"),
)
DRAWS = 100
"""Of the bootstrap: a report is to take seconds."""


def isoflop_charts(arms: Arms, rows: Rows) -> list[Chart]:
    """Profiles, and what they say of larger budgets; none where no budget was given to several sizes."""
    runs = _points(arms, rows)
    runs = {family: found for family, found in runs.items() if _profiled([point for point, _ in found])}
    if not runs:
        return []
    fits = scaling({family: [point for point, _ in found] for family, found in runs.items()}, Bootstrap(draws=DRAWS))
    charts = [_profiles(runs, fits), _laws(fits)]
    return [chart for chart in charts if chart is not None and chart.across and chart.up]


def _points(arms: Arms, rows: Rows) -> dict[str, list[tuple[Point, str]]]:
    """Family → its runs that ended, each with its arm's row; of an arm those with the best learning rate."""
    found: dict[str, list[tuple[Point, str]]] = {}
    for arm in arms.arms:
        setting = arms.best(arm)
        for run in () if setting is None else setting.runs:
            try:
                point = Point.of(run.figures)
            except ConfigError:
                continue
            if run.ended:
                found.setdefault(arm.family, []).append((point, rows.get(arm.label, "")))
    return found


def _profiled(points: Sequence[Point]) -> bool:
    """Whether some budget was given to so many sizes that a parabola can be laid through them."""
    return any(distinct([point.parameters for point in group]) >= LEAST_SIZES for _, group in by_budget(points))


def _profiles(runs: Mapping[str, Sequence[tuple[Point, str]]], fits: Mapping[str, Any]) -> Chart:
    series: list[Series] = []
    groups: dict[str, Style] = {}
    for color, (family, found) in enumerate(runs.items()):
        row_of = dict(found)
        budgets = by_budget([point for point, _ in found])
        for turn, (flops, points) in enumerate(budgets):
            group = f"{family}, {flops:.2g} FLOPs" if len(runs) > 1 else f"{flops:.2g} FLOPs"
            groups[group] = style(color, turn, len(budgets)) if len(runs) > 1 else style(turn)
            columns = {SIZE.name: [point.parameters for point in points], LOSS.name: [point.loss for point in points]}
            series.append(Series(family, group, columns, line=False, marks=True, rows=[
                row_of[point] for point in points]))  # fmt: skip
            for curve in fits[family]["curves"].get("profiles", ()):
                if abs(curve["flops"] / flops - 1) < 1e-6:
                    columns = {SIZE.name: curve["parameters"], **_banded(LOSS.name, curve, "loss")}
                    series.append(Series(f"{family}, fitted", group, columns))
    caption = (
        f"{counted(sum(map(len, runs.values())), 'run')} of {counted(len(runs), 'architecture')}: the loss of each "
        f"budget over the size of the model, and a parabola in the logarithm of the size. {_bands(fits)}"
    )
    for family, fit in fits.items():
        if "fault" in fit["isoflop"]:
            caption += f" No parabolas of {family}: {fit['isoflop']['fault']}."
    return Chart("isoflop_profiles", "IsoFLOP profiles", caption, (SIZE,), (LOSS,), series, groups).reduced()


def _laws(fits: Mapping[str, Any]) -> Chart | None:
    series: list[Series] = []
    said: list[str] = []
    for family, fit in fits.items():
        laws, profiles = fit["curves"].get("laws", {}), fit["isoflop"].get("profiles", ())
        for name, curve in laws.items():
            columns = {FLOPS.name: curve["flops"], **_banded(name, curve, "value")}
            series.append(Series(f"{family}, fitted", family, columns, strong=True))
            exponent = fit["isoflop"]["laws"][name]["exponent"]
            said.append(f"{family}: best {name} grow as FLOPs to the power {_estimate(exponent)}")
        for name in ("parameters", "tokens", "loss"):
            best = [(each["flops"], each["best"][name]) for each in profiles if each["best"][name]["value"] is not None]
            columns = {FLOPS.name: [flops for flops, _ in best], name: [each["value"] for _, each in best]}
            columns |= {name + LOW: [each["low"] for _, each in best], name + HIGH: [each["high"] for _, each in best]}
            series.append(Series(family, family, columns, line=False, marks=True))
        frontier = fit["curves"].get("frontier")
        if frontier is not None:
            columns = {FLOPS.name: frontier["flops"], **_banded("loss", frontier["loss"], "value")}
            series.append(Series(f"{family}, parametric fit", family, columns, strong=True))
    if not any(series.line for series in series):
        return None
    faults = [f"{family}: {fit['parametric']['fault']}" for family, fit in fits.items() if "fault" in fit["parametric"]]
    caption = ". ".join(["Points are the lowest of each parabola, lines go on to ten times the largest budget", *said])
    caption += f". {_bands(fits)}" + (f" No parametric fit of {'; '.join(faults)}." if faults else "")
    return Chart("isoflop_laws", "What the profiles say of larger budgets", caption, (FLOPS,), LAWS, series,
                 list(fits)).reduced()  # fmt: skip


def _banded(name: str, curve: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    return {name: curve[key], name + LOW: curve["low"], name + HIGH: curve["high"]}


def _estimate(found: Mapping[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _bands(fits: Mapping[str, Any]) -> str:
    levels = {fit["isoflop"]["level"] for fit in fits.values() if "level" in fit["isoflop"]}
    shown = f"{100 * max(levels):.0f} % of" if levels else ""
    return f"Bands hold {shown} {DRAWS} draws of a bootstrap of the residuals." if levels else ""
