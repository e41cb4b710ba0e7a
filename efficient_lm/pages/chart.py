"""Charts: lines, bands and points over a choice of measures, drawn where the page is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from efficient_lm.pages.page import escaped
from efficient_lm.pages.palette import Style, style
from efficient_lm.training.reporting import finite

Column = Sequence[float | None]
LOW, HIGH = ":low", ":high"
"""Behind a column's name: the columns with the ends of its range."""


@dataclass(frozen=True)
class Measure:
    """What an axis shows.

    Attributes:
        name: of the columns that have it.
        label: with its unit.
        log: whether the axis begins logarithmic; one can change it.
        more: whether more of it is better.
    """

    name: str
    label: str
    log: bool = False
    more: bool = False


@dataclass(frozen=True)
class Series:
    """Some points, and whether a line goes through them.

    Attributes:
        name: what is shown where one points at it.
        group: that it belongs to in the legend.
        columns: measure → values, all of one length, None where there is none; `name:low` and `name:high` are the ends
            of a range. It is drawn where the chart shows two measures that it has.
        line, marks: whether it is drawn as a line, and as points.
        strong: whether the line stands out.
        labels: of the points, shown in place of the name; none if all are of the name.
        rows: ids of table rows that the points belong to.
    """

    name: str
    group: str
    columns: Mapping[str, Column]
    line: bool = True
    marks: bool = False
    strong: bool = False
    labels: Sequence[str] = ()
    rows: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: its id on the page.
        title: for readers that see no picture.
        caption: what is shown, of how many.
        across, up: measures to choose from, the first one is shown first.
        groups: the legend, in order; styles where they are not those of the order.
        front: the name of the line through points that nothing beats, or empty.
        limits: measure → a value at which a line stands; `limit` is its name.
        settle: whether the vertical axis at first leaves out what only the first steps of training have.
    """

    name: str
    title: str
    caption: str
    across: Sequence[Measure]
    up: Sequence[Measure]
    series: Sequence[Series]
    groups: Mapping[str, Style] | Sequence[str] = field(default_factory=tuple)
    front: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    limit: str = ""
    settle: bool = False

    @property
    def styles(self) -> dict[str, Style]:
        """By group."""
        if isinstance(self.groups, Mapping):
            return dict(self.groups)
        return {name: style(index) for index, name in enumerate(self.groups)}

    def shows(self, across: str, up: str) -> list[Series]:
        """The series that have both measures."""
        return [series for series in self.series if across in series.columns and up in series.columns]

    def reduced(self) -> "Chart":
        """Without measures and groups that nothing has."""
        across = [one for one in self.across if any(self.shows(one.name, up.name) for up in self.up)]
        up = [one for one in self.up if any(self.shows(each.name, one.name) for each in self.across)]
        present = {series.group for series in self.series}
        groups = {name: look for name, look in self.styles.items() if name in present}
        return Chart(**{**self.__dict__, "across": across, "up": up, "groups": groups})


def drawn(chart: Chart) -> str:
    """The chart as HTML, with its data."""
    data = {
        "title": chart.title,
        "across": [one.__dict__ for one in chart.across],
        "up": [one.__dict__ for one in chart.up],
        "groups": [{"name": name, **look._asdict()} for name, look in chart.styles.items()],
        "series": [_compact(series) for series in chart.series],
        "front": chart.front,
        "limits": dict(chart.limits),
        "limit": chart.limit,
        "settle": chart.settle,
    }
    text = json.dumps(finite(data), allow_nan=False, separators=(",", ":"))
    # Inside a script nothing may look like its end.
    return (
        f'<figure class="chart" id="{escaped(chart.name)}">\n'
        f'<script type="application/json">{text.replace("<", "\\u003c")}</script>\n'
        f"<figcaption>{escaped(chart.caption)}</figcaption>\n</figure>"
    )


def _compact(series: Series) -> dict[str, Any]:
    columns = {name: [_short(value) for value in values] for name, values in series.columns.items()}
    found = {"name": series.name, "group": series.group, "columns": columns}
    flags = {name: 1 for name in ("line", "marks", "strong") if getattr(series, name)}
    lists = {name: list(getattr(series, name)) for name in ("labels", "rows") if getattr(series, name)}
    return {**found, **flags, **lists}


def _short(value: float | None) -> float | int | None:
    """Five digits are more than a screen has."""
    if value is None:
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
