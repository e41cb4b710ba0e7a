"""Pages: palette, charts, tables, pictures."""

import base64
import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from efficient_lm.pages.chart import Chart, Measure, Series, drawn
from efficient_lm.pages.page import page, paragraph, section, tiles
from efficient_lm.pages.palette import DARK, DASHES, GREY, GROUNDS, LIGHT, MARKS, style
from efficient_lm.pages.picture import front, picture
from efficient_lm.pages.table import FILTERED, Cell, Column, Table, laid

EVIL = "</script><script>alert(\"1\")</script>\u2028<b onclick='x'>"
# Machado, Oliveira and Fernandes 2009, severity 1: what is left of linear RGB.
VISION = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(color):
    parts = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
             [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    mixed = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
             [0.0259040371, 0.7827717662, -0.808675766]]  # fmt: skip
    return np.array(mixed) @ np.cbrt(np.array(cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize(("colors", "ground"), [(LIGHT, GROUNDS[0]), (DARK, GROUNDS[1])], ids=["light", "dark"])
def test_colours_differ_for_everyone_and_from_the_ground(colors, ground):
    for seen in VISION.values():
        places = [oklab(np.array(seen) @ linear(color)) for color in colors]
        assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(places, 2)) > 0.07
    weights = [0.2126, 0.7152, 0.0722]
    for color in (*colors, GREY):
        low, high = sorted((linear(color) @ weights, linear(ground) @ weights))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_styles_repeat_late():
    looks = [style(index) for index in range(36)]
    assert len({(look.color, look.mark) for look in looks}) == 36
    assert len({(look.color, look.dash) for look in looks[:24]}) == 24
    assert all(look.mark < len(MARKS) and look.dash < len(DASHES) for look in looks)
    pairs = {style(first, second, 2) for first in range(8) for second in range(2)}
    assert len(pairs) == 16 and style(1, 1, 2).color == style(1, 0, 2).color


def a_chart(**changes):
    across, up = [Measure("x", "cost", log=True)], [Measure("y", "loss"), Measure("z", "none")]
    series = [Series("s", "g", {"x": [1.0, 20_000.0, None], "y": [3.123456789, float("nan"), 2.0], "y:low": [3, 3, 3],
                                "y:high": [4, 4, 4]}, marks=True)]  # fmt: skip
    return Chart(**{"name": "c", "title": "t", "caption": "many", "across": across, "up": up, "series": series,
                    "groups": ["g", "empty"]} | changes)  # fmt: skip


def data(text):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])


def test_a_chart_holds_its_data_and_no_more_digits_than_a_screen():
    found = data(drawn(a_chart()))
    assert found["series"][0]["columns"]["x"] == [1, 20_000, None]
    assert found["series"][0]["columns"]["y"] == [3.1235, None, 2]
    assert found["groups"][0] == {"name": "g", "color": 0, "mark": 0, "dash": 0}


def test_a_chart_without_what_nothing_has():
    chart = a_chart().reduced()
    assert [one.name for one in chart.up] == ["y"] and list(chart.groups) == ["g"]
    assert a_chart(series=[]).reduced().across == []


def test_what_is_said_stays_text():
    evil = a_chart(title=EVIL, caption=EVIL, series=[Series(EVIL, EVIL, {"x": [1], "y": [1]}, labels=[EVIL])],
                   groups=[EVIL])  # fmt: skip
    cells = Cell(EVIL, EVIL, link=EVIL, note=EVIL), Cell(EVIL, 1)
    table = Table(EVIL, EVIL, [Column(EVIL, about=EVIL), Column("n", True)], [cells])
    text = page(EVIL, section(EVIL, EVIL, drawn(evil), laid(table), paragraph(EVIL, EVIL)), tiles([(EVIL, EVIL, EVIL)]))
    assert text.count("<script") == text.count("</script") == 2 and "<b " not in text
    assert data(text)["series"][0]["labels"] == [EVIL] and data(text)["title"] == EVIL


def test_the_policy_names_the_page_s_own_script_and_style():
    text = page("t")
    for tag in ("script", "style"):
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text and " style=" not in text and not re.search(r"\son\w+=", text)


def test_tables_say_what_they_are_sorted_by():
    rows = [[Cell("b", "b"), Cell("3.14 (a note)", 3.14159, note="n", marked=True)], [Cell("a", "a"), Cell()]]
    text = laid(Table("t", "two rows", [Column("name"), Column("figure", True)], rows))
    assert '<td class="number marked" data-order="3.14159">3.14 (a note) <small>n</small></td>' in text
    assert '<td class="number" data-order="">–</td>' in text and '<tr id="t-1"><th scope="row">a</th>' in text
    assert "search" not in text and 'aria-labelledby="t-caption"' in text
    many = laid(Table("t", "", [Column("name")], [[Cell(f"{place}", place)] for place in range(FILTERED)]))
    assert '<input type="search"' in many


def test_the_front_is_what_nothing_beats():
    points = [(1, 5), (2, 5), (2, 4), (3, 4.5), (4, 1), (1, 6)]
    assert front(points) == [(1, 5), (2, 4), (4, 1)] and front(points, more=True) == [(1, 6)]
    assert front([]) == []


def test_pictures(tmp_path):
    chart = a_chart(front="best", limits={"x": 50}, limit="budget", settle=True)
    drawn_at = picture(chart, tmp_path / "a.png", chart.across[0], chart.up[0])
    assert drawn_at.read_bytes()[:4] == b"\x89PNG"
    assert picture(chart, tmp_path / "b.png", chart.across[0], chart.up[1]) is None
    none = a_chart(series=[Series("s", "g", {"x": [None], "y": [None]}, line=False)], front="best")
    assert picture(none, tmp_path / "c.png", none.across[0], none.up[0]) is None


@pytest.mark.parametrize("x", [7.7, 17.7, 1935094579200.0])
def test_a_picture_of_lines_of_one_point_each(tmp_path, x):
    """0.9 x + 0.1 x is more than x by rounding, for the first of them."""
    series = [Series(name, "g", {"x": [x], "y": [y]}, marks=True) for name, y in (("a", 1.5), ("b", 2.0))]
    chart = a_chart(series=series, settle=True)
    assert picture(chart, tmp_path / "a.png", chart.across[0], chart.up[0]).stat().st_size > 1000
