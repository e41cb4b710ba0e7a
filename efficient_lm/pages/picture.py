"""A chart as a picture, for places that show no page."""

from pathlib import Path
from typing import Any

from efficient_lm.pages.chart import HIGH, LOW, Chart, Measure, Series
from efficient_lm.pages.palette import DASHES, GREY, LIGHT, MARKS, Style
from efficient_lm.training.reporting import empty_plot, save_plot

SPAN = 3
"""A logarithmic axis goes over at least such a ratio."""
LEGEND = 24
"""Groups that a picture has names for."""


def picture(chart: Chart, path: Path, across: Measure, up: Measure) -> Path | None:
    """Draw one pair of measures as a PNG at `path`, whole or not at all; None if no point has both."""
    series = [
        each for each in chart.shows(across.name, up.name)
        if any(None not in row for row in zip(each.columns[across.name], each.columns[up.name], strict=True))
    ]  # fmt: skip
    if not series:
        return None
    axes = empty_plot(across.label, up.label, chart.title)
    styles, named = chart.styles, set()
    points: list[tuple[float, float]] = []
    for each in series:
        name = None if each.group in named else each.group
        points += _draw(axes, each, across.name, up.name, styles[each.group], name)
        named.add(each.group)
    _scale(axes, [x for x, _ in points], across.log)
    if chart.front:
        _draw_front(axes, points, up.more, chart.front)
    if across.name in chart.limits:
        axes.axvline(chart.limits[across.name], color=LIGHT[1], linewidth=1, linestyle="--", label=chart.limit)
    if chart.settle:
        _settle(axes, series, across.name, up.name)
    _legend(axes, len(named))
    return save_plot(axes, path)


def _scale(axes: Any, values: list[float], log: bool) -> None:
    """Ticks as ``10 k``, ``2 M``; logarithmic where values differ enough for that to have any."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    least, most = min(values, default=0), max(values, default=0)
    if log and least > 0 and most >= SPAN * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if most > 100 * least else (1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    if least > 0 and (most >= 1e4 or axes.get_xscale() == "log"):
        small = most < 1
        axes.xaxis.set_major_formatter("{x:.0e}" if small else EngFormatter())


def _draw(axes: Any, series: Series, across: str, up: str, look: Style, name: str | None) -> list[tuple[float, float]]:
    """Draw one series; gives back its points."""
    columns = series.columns
    rows = [row for row in zip(columns[across], columns[up], columns.get(up + LOW, columns[up]),
            columns.get(up + HIGH, columns[up]), strict=True) if None not in row]  # fmt: skip
    x, y, low, high = (list(values) for values in zip(*rows, strict=True))
    color = GREY if look.color is None else LIGHT[look.color]
    ranged = up + LOW in columns
    if series.line:
        dash = (0, DASHES[look.dash]) if DASHES[look.dash] else "-"
        width = 1.9 if series.strong else 1.1
        axes.plot(x, y, color=color, linestyle=dash, linewidth=width, alpha=1 if series.strong else 0.75,
                  marker=MARKS[look.mark] if series.marks else None, markersize=5, label=name)  # fmt: skip
        if ranged:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.plot(x, y, MARKS[look.mark], color=color, markersize=6, label=name)
        if ranged:
            axes.vlines(x, low, high, color=color, linewidth=1)
    return list(zip(x, y, strict=True))


def front(points: list[tuple[float, float]], more: bool = False) -> list[tuple[float, float]]:
    """The points that no other one beats: from the least cost on, each better than all before."""
    sign = -1 if more else 1
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best


def _draw_front(axes: Any, points: list[tuple[float, float]], more: bool, name: str) -> None:
    best = front(points, more)
    axes.step(*zip(*best, strict=True), where="post", color="#59616c", linestyle="--", linewidth=1.1, zorder=1,
              label=name)  # fmt: skip


def _settle(axes: Any, series: list[Series], across: str, up: str) -> None:
    """Leave out of the vertical axis what only the first tenth of each line has."""
    low, high = [], []
    for each in series:
        known = [row for row in zip(each.columns[across], each.columns[up], strict=True) if None not in row]
        if known:
            first = known[0][0] + 0.1 * (known[-1][0] - known[0][0])
            low.append(min(y for _, y in known))
            high.append(max(y for x, y in known if x >= first))
    if low and max(high) > min(low):
        room = 0.04 * (max(high) - min(low))
        axes.set_ylim(min(low) - room, max(high) + room)


def _legend(axes: Any, groups: int) -> None:
    if 1 < groups <= LEGEND:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
