"""Which runs a report is of."""

import json

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.report.sources import find


def names(sources):
    return [found.path.name for found in sources.runs]


def test_a_run_a_folder_a_pattern_and_several(made_run, tmp_path):
    a, b = made_run("a"), made_run("b")
    (tmp_path / "notes").mkdir()
    assert names(find([str(a)])) == ["a"] and find([str(a)]).folders == (a,)
    assert names(find([str(tmp_path)])) == ["a", "b"]
    assert names(find([str(tmp_path / "*")])) == ["a", "b"]
    assert names(find([str(b), str(tmp_path / "?"), str(a)])) == ["b", "a"]


def test_what_is_left_of_a_run_is_one(made_run, tmp_path):
    run = made_run("a")
    for name in ("config.yaml", "summary.json"):
        (run / name).unlink()
    assert names(find([str(tmp_path)])) == ["a"]
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints").mkdir()
    assert names(find([str(tmp_path)])) == ["a"]


def test_a_sweep_is_what_its_table_says(made_sweep, tmp_path):
    waiting = {"name": "later", "choices": {"mixer": "gla"}, "state": "waiting", "run": "runs/later"}
    sweep = made_sweep({"a": {}, "b": {"mixer": "gla"}}, rows=[waiting])
    sources = find([str(sweep)])
    assert names(sources) == ["a", "b", "later"] and {found.sweep for found in sources.runs} == {"sweep"}
    assert sources.runs[1].row["choices"]["mixer"] == "gla" and sources.notes == ()
    # The folder above holds the sweep; a run named again by itself is still that of the sweep.
    again = find([str(sweep / "runs" / "a"), str(tmp_path)])
    assert names(again) == ["a", "b", "later"] and again.runs[0].sweep == "sweep"


@pytest.mark.parametrize("text", [None, "{torn", "[1]", '{"rows": 3}', '{"rows": [3]}'])
def test_a_sweep_without_a_table_is_its_runs(made_sweep, text):
    sweep = made_sweep({"a": {}, "b": {}})
    (sweep / "sweep.yaml").write_text("name: sweep\n")
    (sweep / "table.json").unlink() if text is None else (sweep / "table.json").write_text(text)
    sources = find([str(sweep)])
    assert names(sources) == ["a", "b"] and sources.runs[0].sweep == ""
    assert len(sources.notes) == 1 and "table.json" in sources.notes[0]


@pytest.mark.parametrize("run", ["../outside", "/etc", "", None, 7, "runs/link"])
def test_a_table_does_not_lead_out_of_its_sweep(made_sweep, made_run, tmp_path, run):
    outside = made_run("outside")
    sweep = made_sweep({"a": {}})
    (sweep / "runs" / "link").symlink_to(outside)
    table = json.loads((sweep / "table.json").read_text())
    table["rows"][0]["run"] = run
    (sweep / "table.json").write_text(json.dumps(table))
    found = find([str(sweep)]).runs[0]
    assert found.path.resolve() != outside and found.path.is_relative_to(sweep) and not found.path.exists()
    assert "not inside" in found.row["reason"]


def test_faults_name_the_folder_and_what_a_run_has(made_run, tmp_path):
    made_run("attention")
    (tmp_path / "empty").mkdir()
    for named, said in {
        tmp_path
        / "atention": f"runs: {tmp_path / 'atention'}: no such folder; did you mean '{tmp_path / 'attention'}'",
        tmp_path / "empty": f"runs: {tmp_path / 'empty'}: no run in it; a run directory has config.yaml",
        tmp_path / "attention" / "config.yaml": "not a folder",
        tmp_path / "x*": "no run in 0 folders that it matches",
        tmp_path / "e*": "no run in 1 folders that it matches",
    }.items():
        with pytest.raises(ConfigError) as fault:
            find([str(named)])
        assert said in str(fault.value) and str(named) in str(fault.value)
