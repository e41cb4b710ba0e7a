"""The verb `report`, on runs that were trained."""

import json
import shutil

import pytest


@pytest.fixture
def runs(plain, nested, tmp_path):
    for folder, name in ((plain, "plain"), (nested, "nested")):
        shutil.copytree(folder, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_a_report_of_runs(run, runs, tmp_path):
    status, out, err = run("report", f"runs=[{runs / 'plain'},{runs / 'nested'}]", f"output={tmp_path / 'page'}")
    assert (status, err) == (0, "") and out.startswith(f"2 runs: {tmp_path / 'page' / 'report.html'}")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "nesting.kind" in page and 'href="../runs/plain/"' in page and "<h1>plain, nested</h1>" in page
    # Nothing is wrong with runs that came to their end, and they know what they cost.
    assert "Incomplete runs" not in page and "cache of one sequence" in page and "forward FLOPs per token" in page
    assert (tmp_path / "page" / "losses_tokens.png").is_file()


def test_patterns_titles_and_where_it_goes_by_itself(run, runs):
    status, out, _ = run("report", f"runs={runs}", "title='All of them'")
    assert status == 0 and (runs / "report" / "report.html").read_text().count("All of them") == 2
    status, out, _ = run("report", f"runs={runs}/*", f"output={runs / 'again'}")
    assert status == 0 and out.startswith("2 runs: ")
    status, _, err = run("report", f"runs=[{runs / 'plain'},{runs / 'nested'}]")
    assert status == 2 and err.startswith("error: output: a value is needed") and err.count("\n") == 1


def test_a_run_that_is_half_written_is_no_fault(run, runs):
    metrics = runs / "plain" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    (runs / "plain" / "summary.json").unlink()
    status, out, err = run("report", f"runs={runs}")
    assert (status, err) == (0, "")
    page = (runs / "report" / "report.html").read_text()
    assert "the last line of metrics.jsonl is torn" in page and "no summary.json" in page


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["runs={0}/empty"],
            "runs: {0}/empty: no run in it; a run directory has config.yaml, metrics.jsonl, summary.json",
        ),
        (["runs={0}/emtpy"], "runs: {0}/emtpy: no such folder; did you mean '{0}/empty'"),
        (["runs={0}/x*"], "no run in 0 folders"),
        ([], "runs: a value is needed"),
        (["runs=[]"], "runs: "),
        (["runs=a", "outptu=b"], "outptu: unknown key; did you mean 'output'"),
    ],
)
def test_faults(run, tmp_path, keys, said):
    (tmp_path / "empty").mkdir()
    status, out, err = run("report", *(key.format(tmp_path) for key in keys))
    assert (status, out) == (2, "") and said.format(tmp_path) in err and err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty"]


def test_summaries_say_what_a_run_costs(plain):
    summary = json.loads((plain / "summary.json").read_text())
    # Keys and values of 32 tokens, 16 wide, in two layers, float32.
    assert summary["cache_bytes"] >= 2 * 2 * 32 * 16 * 4
    assert 0 < summary["flops_per_token"] < summary["training_flops"] / summary["tokens"]
