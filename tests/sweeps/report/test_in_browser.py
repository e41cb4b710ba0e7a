"""A report and the page of a search in a browser, at the sizes of a phone and of a screen, light and dark."""

import importlib.util
from pathlib import Path

import pytest

from efficient_lm.elastic.search.report import Row, write_report
from efficient_lm.sweeps.report.sources import find
from efficient_lm.sweeps.report.write import report

SIZES = {"phone": (375, 812), "screen": (1280, 900)}
EVIL = "<script>alert(1)</script>"


def _module():
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = _module().Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def address(made_run, tmp_path):
    """Of a report of mixers with several widths, rates and seeds, with runs that are torn and names that are code."""
    for mixer in ("attention", "mamba2", EVIL):
        for width in (32, 64):
            for rate in (1e-3, 1e-2):
                for seed in (0, 1):
                    name = f"{mixer[:4].strip('<')}-{width}-{rate:g}-{seed}"
                    made_run(name, 3 + 20 * rate + seed / 9, mixer=mixer, width=width, rate=rate, seed=seed,
                             accuracy=width / 80 - seed / 9, folder=tmp_path / "runs")  # fmt: skip
    (tmp_path / "runs" / "atte-32-0.001-0" / "summary.json").unlink()
    return report(find([str(tmp_path / "runs")]), tmp_path / "report", EVIL)[0].as_uri()


def rendered(browser, address, size, dark):
    width, height = SIZES[size]
    browser.open(address, width, height, dark, phone=size == "phone")
    assert browser.messages == [] and browser.requests == [address]
    widths = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1]
    # Nothing but what scrolls in a box of its own sticks out.
    inside = """[...document.querySelectorAll('main *')].filter(each => !each.closest('.box, svg') &&
        each.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(each => each.outerHTML)"""
    assert browser.evaluate(inside) == []
    small = """[...document.querySelectorAll('body *')].filter(each => each.childNodes.length &&
        [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()) &&
        !['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(each.tagName) && each.getClientRects().length &&
        parseFloat(getComputedStyle(each).fontSize) < 14).map(each => each.outerHTML)"""
    assert browser.evaluate(small) == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_report_is_drawn(browser, address, size, dark):
    rendered(browser, address, size, dark)
    found = browser.evaluate("""[...document.querySelectorAll('figure.chart')].map(figure => [figure.id,
        figure.querySelectorAll('.plot svg .series').length, figure.querySelectorAll('.plot svg text').length])""")
    assert [name for name, _, _ in found] == ["envelopes", "losses", "rates", "pareto", "recall"]
    assert all(series > 0 and texts > 6 for _, series, texts in found)
    grounds = browser.evaluate("""['section', 'body'].map(each => getComputedStyle(document.querySelector(each))
        .backgroundColor.match(/\\d+/g).slice(0, 3).map(Number))""")
    assert all((max(ground) < 60) if dark else (min(ground) > 230) for ground in grounds)
    assert browser.evaluate("[document.title, document.querySelector('h1').textContent]") == [EVIL, EVIL]


@pytest.mark.slow
def test_tables_are_sorted_by_pointer_and_by_key(browser, address):
    browser.open(address, *SIZES["screen"])
    column = """[...document.querySelector('#runs').tBodies[0].rows].map(row => row.cells[4].dataset.order)"""
    heading = "document.querySelector('#runs').tHead.rows[0].cells[4]"
    before = browser.evaluate(column)
    browser.evaluate(f"{heading}.querySelector('button').scrollIntoView({{block: 'center'}})")
    place = browser.evaluate(f"""(() => {{ const box = {heading}.querySelector('button').getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]; }})()""")
    browser.click(*place)
    rising = browser.evaluate(column)
    assert rising == sorted(before, key=float) != before
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "ascending"
    browser.evaluate(f"{heading}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.evaluate(column) == rising[::-1]
    # What is missing stays at the end, whichever way.
    (missing,) = browser.evaluate("""[...document.querySelector('#arms').tHead.rows[0].cells].map((cell, place) =>
        cell.textContent === 'best learning rate' ? place : -1).filter(place => place >= 0)""")
    rows = f"[...document.querySelector('#arms').tBodies[0].rows].map(row => row.cells[{missing}].dataset.order)"
    for _ in range(2):
        browser.evaluate(
            f"document.querySelector('#arms').tHead.rows[0].cells[{missing}].querySelector('button').click()"
        )
        assert "" not in browser.evaluate(rows)[:-1]


@pytest.mark.slow
def test_charts_answer_to_the_pointer_the_keys_and_their_controls(browser, address):
    browser.open(address, *SIZES["screen"])
    browser.evaluate("document.querySelector('#pareto .plot').scrollIntoView({block: 'center'})")
    mark = browser.evaluate("""(() => { const box = document.querySelector('#pareto .mark').getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]; })()""")
    tip = "(() => { const tip = document.querySelector('#pareto .tip'); return tip.hidden ? null : tip.innerText; })()"
    assert browser.evaluate(tip) is None
    browser.move(*mark)
    said = browser.evaluate(tip)
    assert "width" in said and "validation loss (nats per token): 3." in said and "parameters: " in said
    browser.click(*mark)
    assert browser.evaluate("document.querySelectorAll('tr.chosen').length") == 1
    browser.evaluate("document.querySelector('#pareto .plot').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate(tip) is not None
    shown = "document.querySelectorAll('#pareto .plot .series').length"
    before = browser.evaluate(shown)
    browser.evaluate("document.querySelector('#pareto .legend button:not(.every)').click()")
    assert browser.evaluate(shown) == before - 1
    browser.evaluate("""(() => { const select = document.querySelectorAll('#pareto select')[1]; select.value = 1;
        select.dispatchEvent(new Event('change')); })()""")
    assert browser.evaluate("document.querySelector('#pareto text.title').textContent") == "training FLOPs per token"
    browser.evaluate("""(() => { const field = document.querySelector('#runs').closest('.table').querySelector('input');
        field.value = 'mamb 64'; field.dispatchEvent(new Event('input')); })()""")
    assert browser.evaluate("[...document.querySelectorAll('#runs tbody tr')].filter(row => !row.hidden).length") == 4
    assert browser.messages == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_page_of_a_search(browser, tmp_path, size):
    rows = [Row({"ffn": [0.25 * size, 1.0]}, {"params": 1e6 * size, "cache_bytes": 5.0}, 4 - size / 9, size == 2, True)
            for size in range(1, 5)]  # fmt: skip
    write_report(tmp_path, rows, "loss", "params", rows[2], {"params": 3.5e6})
    rendered(browser, (tmp_path / "pareto.html").as_uri(), size, dark=False)
    assert browser.evaluate("document.querySelectorAll('.plot .mark').length") == 4
    assert browser.evaluate("document.querySelectorAll('line.limit').length") == 1
    browser.evaluate("document.querySelector('#scored-2').click()")
    assert browser.evaluate("document.querySelectorAll('.plot circle.chosen').length") == 1


def test_without_a_browser_the_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"chromium, chromium-browser, google-chrome.*apt-get install chromium"):
        _module().executable()
