"""The page, the tables in it, the pictures beside it."""

import csv
import html
import json
import re
from pathlib import Path

import pytest

from efficient_lm.errors import ResourceError
from efficient_lm.sweeps.report import write
from efficient_lm.sweeps.report.arms import arms_of
from efficient_lm.sweeps.report.charts import pareto_chart, rate_chart, recall_chart
from efficient_lm.sweeps.report.runs import read
from efficient_lm.sweeps.report.sources import find
from efficient_lm.sweeps.report.tables import arms_table, differences_table, faults_table, link, number
from efficient_lm.sweeps.report.write import report


def arms_below(folder):
    return arms_of([read(found) for found in find([str(folder)]).runs])


def cells(page, table):
    """The text of a table's rows, without tags."""
    body = re.search(rf'<table id="{table}".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows
    ]


def data_of(page, chart):
    return json.loads(re.search(rf'id="{chart}">\s*<script type="application/json">(.*?)</script>', page)[1])


@pytest.fixture
def grid(made_sweep):
    """Two mixers, two learning rates, two seeds; a third mixer failed."""
    arms = [("attention", 3.0), ("gla", 3.5)]
    runs = {
        f"{mixer}-{rate:g}-{seed}": {"mixer": mixer, "rate": rate, "seed": seed, "end": end + over + seed / 10}
        for mixer, end in arms for rate, over in ((1e-3, 0), (1e-2, 1)) for seed in (0, 1)
    }  # fmt: skip
    failed = {"name": "mamba2", "choices": {"mixer": "mamba2", "optimizer.learning_rate": 1e-3}, "seed": 0,
              "state": "failed", "run": "runs/mamba2", "figures": {}, "reason": "resources: out of memory"}  # fmt: skip
    return made_sweep(runs, rows=[failed])


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of a report's time."""
    monkeypatch.setattr(write, "picture", lambda *arguments: None)


def test_a_report_of_a_sweep(grid, tmp_path):
    files = report(find([str(grid)]), grid / "report", "A sweep")
    page = files[0].read_text()
    assert [file.name for file in files[:3]] == ["report.html", "runs.csv", "report.md"] and "<h1>A sweep</h1>" in page
    pictures = {file.name for file in files[3:]}
    assert pictures <= {f"{chart}_{name}.png" for chart, names in write.DRAWN.items() for name in names}
    assert pictures == {"losses_tokens.png", "losses_flops.png", "losses_seconds.png", "envelopes_tokens.png",
                        "rates_learning_rate.png"}  # fmt: skip
    assert all((grid / "report" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    arms = {row[0]: row for row in cells(page, "arms")}
    assert list(arms) == ["attention", "gla", "mamba2"] and arms["gla"][1:3] == ["0.001", "2"]
    assert "3.1500 3.1000 to 3.2000" in arms["attention"] and arms["mamba2"][2] == "0 1 not ended"
    assert [row[:2] for row in cells(page, "missing")] == [["mamba2", "failed"]] and "out of memory" in page
    assert len(data_of(page, "losses")["series"]) == 16 and len(data_of(page, "rates")["series"]) == 2
    assert [row["state"] for row in csv.DictReader(files[1].open())] == ["finished"] * 8 + ["failed"]

    asks_for_nothing(page, grid / "report")
    lines = files[2].read_text().splitlines()
    assert lines[0] == "# A sweep" and lines[2].startswith("| arm | best learning rate | seeds | ")
    assert lines[4].startswith("| attention | 0.001 | 2 | ") and "| **3.1500** (3.1000 to 3.2000) |" in lines[4]
    assert {f"![{name[:-4].replace('_', ' ')}]({name})" for name in pictures} <= set(lines)


def asks_for_nothing(page, folder):
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.findall(r"<(?:link|img|iframe|object)\b|\bsrc=|@import|url\((?!#)", page)
    assert "default-src 'none'" in page and "NaN" not in page
    for target in re.findall(r'href="([^"]*)"', page):
        assert target.startswith("#") or (folder / target).exists(), target
    anchors = set(re.findall(r'href="#([^"]*)"', page))
    assert anchors and anchors <= set(re.findall(r'<section id="([^"]*)"', page))


def test_nothing_of_a_run_is_read_as_html(made_run, tmp_path, undrawn):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
    runs = [made_run("a", mixer=evil), made_run("b", mixer="gla", seed=1)]
    for run in runs:
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("name: a", "name: </script><b>"))
    (runs[1] / "summary.json").write_text(json.dumps({"stopped_by": "</td><script>alert(3)</script>"}))
    page = report(find([str(tmp_path)]), tmp_path / "report", evil)[0].read_text()
    # One script of data for each chart, and the page's own: no run added one.
    assert page.count("<script") == len(re.findall(r'<figure class="chart"', page)) + 1
    assert page.count("</script") == page.count("<script") and "<img" not in page and "<b>" not in page
    assert html.escape(evil) in page


def test_names_that_are_no_text(made_run, tmp_path, undrawn):
    made_run("a"), made_run("b\udcff", seed=1)
    files = report(find([str(tmp_path)]), tmp_path / "report", "odd")
    assert 'href="../b%FF/"' in files[0].read_text() and "b?" in files[0].read_text()


def test_half_written_runs_are_reported_as_such(made_run, tmp_path, undrawn):
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (made_run(f"without-{name[:6]}") / name).write_bytes(b"\x00{")
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    page = report(find([str(tmp_path)]), tmp_path / "report", "x")[0].read_text()
    missing = {row[0]: row[2] for row in cells(page, "missing")}
    assert set(missing) == {"bare", "without-config", "without-metric", "without-summar"}
    assert missing["bare"] == (
        "no config.yaml; neither metrics.jsonl nor summary.json: nothing was trained here, or it was killed early"
    )
    nothing = report(find([str(tmp_path / "bare")]), tmp_path / "other", "x")
    assert len(nothing) == 3 and "no config.yaml" in nothing[0].read_text()


def test_pictures_of_an_earlier_report_go(grid, undrawn):
    (grid / "report").mkdir()
    for name in ("recall_cache_bytes.png", "losses_mine.png"):
        (grid / "report" / name).write_bytes(b"")
    report(find([str(grid)]), grid / "report", "A sweep")
    assert not (grid / "report" / "recall_cache_bytes.png").exists() and (grid / "report" / "losses_mine.png").exists()


@pytest.mark.parametrize(("evaluations", "drawn"), [(1, "loss"), (2, "loss"), (4, "val_loss")])
def test_pictures_along_training_are_of_what_has_curves(made_run, tmp_path, monkeypatch, evaluations, drawn):
    rows = (made_run("a") / "metrics.jsonl").read_text().splitlines()
    scored = [row for row in rows if "val_loss" in row]
    kept = [row for row in rows if row not in scored[evaluations:]]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(row + "\n" for row in kept))
    made = {}
    monkeypatch.setattr(write, "picture", lambda chart, path, across, up: made.update({path.name: up.name}))
    report(find([str(tmp_path)]), tmp_path / "report", "x")
    assert made["losses_tokens.png"] == drawn


def test_a_folder_that_cannot_be_made(grid, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="output: cannot write to"):
        report(find([str(grid)]), tmp_path / "file" / "report", "x")


def test_quality_against_cost_and_recall_against_state(made_run, tmp_path):
    for mixer, accuracy in (("attention", 0.9), ("gla", 0.4)):
        for width in (32, 64):
            for seed in (0, 1):
                made_run(f"{mixer}-{width}-{seed}", 4 - accuracy, mixer=mixer, width=width, seed=seed,
                         accuracy=accuracy * width / 64 + seed / 100)  # fmt: skip
    arms = arms_below(tmp_path)
    rows = {arm.label: f"row-{arm.label}" for arm in arms.arms}
    pareto = pareto_chart(arms, rows)
    assert [one.name for one in pareto.across] == ["parameters", "training_flops_per_token", "training_flops",
                                                   "cache_bytes", "seconds"]  # fmt: skip
    assert [series.group for series in pareto.series] == ["attention", "gla"]
    assert pareto.series[0].columns["parameters"] == [32_000, 64_000] and "means of 2 seeds" in pareto.caption
    recall = recall_chart(arms, rows)
    columns = recall.series[1].columns
    assert columns["cache_bytes"] == [320, 640] and columns["val_accuracy"] == pytest.approx([0.205, 0.405])
    assert columns["val_accuracy:low"] == pytest.approx([0.2, 0.4]) and recall.series[1].line
    assert recall.series[1].rows == ["row-gla · width 32", "row-gla · width 64"]
    assert rate_chart(arms, rows) is None


NESTED = {"sizes": [{"size": "0.5", "parameters": 40_000, "flops_per_token": 8e4},
                    {"size": "1", "parameters": 64_000, "flops_per_token": 1.3e5}]}  # fmt: skip


def test_sizes_nested_in_one_model(made_run, tmp_path, undrawn):
    for seed in (0, 1):
        made_run(f"nested-{seed}", 3.0, seed=seed, **NESTED, **{"val_loss_0.5": 3.5 + seed / 10})
    made_run("alone", 3.4, mixer="gla", width=40)
    arms = arms_below(tmp_path)
    series = pareto_chart(arms, {"attention": "row"}).series[-1]
    assert series.columns["parameters"] == [40_000, 64_000] and series.columns["val_loss"] == pytest.approx([3.55, 3.1])
    assert series.columns["val_loss:low"] == pytest.approx([3.5, 3.1]) and series.group == "attention"
    assert series.line and series.labels == ["attention, size 0.5", "attention, size 1"] and series.rows == ["row"] * 2
    files = report(find([str(tmp_path)]), tmp_path / "report", "x")
    assert cells(files[0].read_text(), "sizes") == [
        ["attention", "0.5", "3.5500 3.5000 to 3.6000", "40,000", "80,000"],
        ["attention", "1", "3.1000", "64,000", "130,000"],
    ]
    assert "| attention | 1 | 3.1000 | 64,000 | 130,000 |" in files[2].read_text()


def test_a_report_without_nested_sizes_has_no_table_of_them(made_run, tmp_path, undrawn):
    for name, sizes in (("a", None), ("b", "half"), ("c", [1, {"size": 0.5}, {}])):
        made_run(name, mixer=name, sizes=sizes)
    page = report(find([str(tmp_path)]), tmp_path / "report", "x")[0].read_text()
    assert "Sizes in one model" not in page and len(cells(page, "runs")) == 3


def test_a_sweep_s_own_metric_decides(made_sweep, undrawn):
    """Which of two rates is the better one, and what is shown first."""
    sweep = made_sweep(
        {"a": {"rate": 1e-3, "end": 3.0, "accuracy": 0.2}, "b": {"rate": 1e-2, "end": 4.0, "accuracy": 0.9}}
    )
    for metric, rate in (("val_accuracy", "0.01"), ("val_loss", "0.001"), ("unheard_of", "0.001")):
        table = json.loads((sweep / "table.json").read_text())
        (sweep / "table.json").write_text(json.dumps(table | {"metric": metric}))
        page = report(find([str(sweep)]), sweep / "report", "x")[0].read_text()
        assert cells(page, "arms")[0][1] == rate
        assert data_of(page, "rates")["up"][0]["name"] == (metric if metric in ("val_accuracy",) else "val_loss")


def test_recall_says_whose_state_is_not_known(made_run, tmp_path):
    made_run("a", accuracy=0.5), made_run("b", accuracy=0.6, mixer="gla", cache_bytes=None)
    assert "The state of 1 arm is not known" in recall_chart(arms_below(tmp_path), {}).caption
    for run in ("a", "b"):
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        (tmp_path / run / "summary.json").write_text(json.dumps(summary | {"cache_bytes": None, "parameters": None}))
    assert recall_chart(arms_below(tmp_path), {}) is None


def test_the_best_of_every_measure_stands_out(made_run, tmp_path):
    made_run("a", 3.0, accuracy=0.2), made_run("b", 2.0, mixer="gla", accuracy=0.1)
    table = arms_table(arms_below(tmp_path))
    marked = {(row[0].text, column.title) for row in table.rows for cell, column in zip(row, table.columns, strict=True)
              if cell.marked}  # fmt: skip
    assert marked == {("b", "validation loss"), ("b", "training loss"), ("a", "accuracy")}


def test_differences_stand_in_rows_or_in_columns(made_run, tmp_path):
    for name, mixer, rate in (("a", "gla", 1e-3), ("b", "gla", 2e-4), ("c", "attention", 1e-3), ("d", "gla2", 1e-3)):
        made_run(name, mixer=mixer, rate=rate)
    table = differences_table(arms_below(tmp_path))
    assert [column.title for column in table.columns] == ["key", "attention", "gla", "gla2"]
    kinds, rates = table.rows
    assert [cell.text for cell in kinds] == ["model.blocks.layer.mixer.kind", "attention", "gla", "gla2"]
    assert [cell.text for cell in rates] == ["optimizer.learning_rate", "0.001", "0.0002, 0.001", "0.001"]
    assert [cell.marked for cell in rates] == [False, False, True, False] and not any(cell.marked for cell in kinds)
    for seed in range(1, 8):
        made_run(f"m{seed}", width=seed, seed=seed)
    table = differences_table(arms_below(tmp_path))
    assert [column.title for column in table.columns][:3] == ["arm", "model.blocks.layer.mixer.kind", "model.width"]
    assert len(table.rows) == 10
    made_run("e", mixer="gla", rate=3e-3, folder=tmp_path / "one"), made_run("f", mixer="gla", folder=tmp_path / "one")
    assert len(differences_table(arms_below(tmp_path / "one")).rows) == 1
    assert differences_table(arms_below(tmp_path / "one" / "e")) is None


def test_links_are_relative_and_plain(tmp_path):
    run = tmp_path / "runs" / "java script:alert(1)#?"
    run.mkdir(parents=True)
    assert link(run, tmp_path / "report") == "../runs/java%20script%3Aalert%281%29%23%3F/"
    assert link(tmp_path / "none", tmp_path) == "" and link(run, run / "report") == "../"
    assert not faults_table([], tmp_path).rows


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [(None, "", "–"), (3.14159, "val_loss", "3.1416"), (1234567, "", "1.235 M"), (4096e6, "", "4.096 G"),
     (999, "", "999"), (12345, "", "12,345"), (0.0123, "", "0.01230"), (2.5e-5, "", "2.500e-05"), (0, "", "0"),
     (1234.5, "", "1,234")],
)  # fmt: skip
def test_numbers(value, name, text):
    assert number(value, name) == text


def test_isoflop_profiles(made_run, tmp_path):
    for budget in (1e9, 4e9):
        for size in (0.25, 0.5, 1.0, 2.0, 4.0):
            best = 1e4 * (budget / 1e9) ** 0.5
            loss = 3.0 - 0.1 * (budget > 1e9) + 0.3 * abs(size - 1) ** 2 / (1 + size**2)
            made_run(f"C{budget:g}-{size}", loss, width=int(size * 16), parameters=size * best, training_flops=budget)
    sources = find([str(tmp_path)])
    files = report(sources, tmp_path / "report", "IsoFLOP")
    page = files[0].read_text()
    profiles, laws = data_of(page, "isoflop_profiles"), data_of(page, "isoflop_laws")
    assert [group["name"] for group in profiles["groups"]] == ["1e+09 FLOPs", "4e+09 FLOPs"]
    assert sum(bool(series.get("line")) for series in profiles["series"]) == 2
    best = next(series for series in laws["series"] if "parameters" in series["columns"] and series.get("marks"))
    assert best["columns"]["parameters"][1] / best["columns"]["parameters"][0] == pytest.approx(2, rel=0.05)
    assert {"isoflop_profiles_parameters.png", "isoflop_laws_flops.png"} <= {file.name for file in files}
    assert Path(files[0]).stat().st_size < 1e6
