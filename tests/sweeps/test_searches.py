"""Searches: what is drawn, what is stopped early, and that stopping the sweep changes neither."""

import json

import optuna
import pytest

from efficient_lm.sweeps.table import Line, front

SPACE = ["loss=interval(1,5)", "+layers=range(2,7,2)", "+mixer=a,b"]


def study(folder):
    return optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")


def choices(result):
    return [row.choices for row in result.rows]


@pytest.mark.parametrize("kind", ["random", "tpe", "nsga2"])
def test_places_are_drawn_within_the_axes(sweep, tmp_path, kind):
    startup = ["search.startup=2"] if kind == "tpe" else []
    result = sweep(*SPACE, f"search={kind}", "search.trials=5", *startup)
    assert [row.state for row in result.rows] == ["finished"] * 5
    assert [row.name for row in result.rows] == [f"trial_{number:03}" for number in range(5)]
    for place in choices(result):
        assert 1 <= place["loss"] <= 5 and place["layers"] in (2, 4, 6) and place["mixer"] in ("a", "b")
    assert len({place["loss"] for place in choices(result)}) == 5
    values = [trial.value for trial in study(tmp_path / "sweep").trials]
    assert values == [row.figures["val_loss"] for row in result.rows]


def test_a_search_in_parts_is_the_search_in_one_go(sweep, tmp_path):
    options = ["search=tpe", "search.startup=2", "name=x"]
    sweep(*SPACE, *options, "search.trials=3")
    whole = choices(sweep(*SPACE, *options, "search.trials=7"))
    assert len(whole) == 7
    (tmp_path / "sweep").rename(tmp_path / "other")
    assert choices(sweep(*SPACE, *options, "search.trials=7")) == whole


def test_other_seeds_of_a_place_repeat_it(sweep):
    rows = sweep(*SPACE, "search=random", "search.trials=2", "seeds=[4,5]").rows
    assert [row.name for row in rows] == [f"trial_00{n}-seed_{seed}" for n in (0, 1) for seed in (4, 5)]
    assert rows[0].choices == rows[1].choices != rows[2].choices == rows[3].choices
    assert rows[1].figures["val_loss"] - rows[0].figures["val_loss"] == pytest.approx(0.01)


def test_conditional_axes_are_drawn_where_their_condition_holds(sweep, tmp_path):
    when = "when=[{if: {mixer: b}, axes: {+heads: [1,2]}}]"
    rows = sweep(*SPACE, when, "search=random", "search.trials=8", "exclude=[{layers: 2}]").rows
    assert {("heads" in row.choices) == (row.choices["mixer"] == "b") for row in rows} == {True}
    assert {row.choices["mixer"] for row in rows} == {"a", "b"} and 2 not in {row.choices["layers"] for row in rows}


def test_runs_that_are_behind_are_stopped(sweep, tmp_path):
    pruner = ["search.pruner={kind: median, startup: 1}", "seconds=0.05", "steps=40"]
    rows = sweep("loss=1,9", *pruner).rows
    assert [row.state for row in rows] == ["finished", "pruned"]
    assert rows[1].figures["step"] < 40 and rows[1].reason.startswith("behind others at step")
    summary = json.loads((tmp_path / "sweep" / rows[1].run / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGTERM"
    trial = study(tmp_path / "sweep").trials[1]
    assert trial.state is optuna.trial.TrialState.PRUNED and trial.intermediate_values
    assert sweep("loss=1,9", *pruner).rows == rows


@pytest.mark.parametrize("pruner", ["{kind: asha, least: 2, reduction: 2}", "{kind: hyperband, most: 40}"])
def test_pruners_build(sweep, pruner):
    rows = sweep("loss=1,2,3,4", f"search.pruner={pruner}", "seconds=0.01", "steps=20").rows
    assert {row.state for row in rows} <= {"finished", "pruned"} and rows[0].state == "finished"


def test_several_objectives_have_a_front(sweep, tmp_path, capsys):
    objectives = "search.objectives=[val_loss,{name: step, direction: maximize}]"
    sweep("loss=interval(1,5)", "search=nsga2", "search.trials=4", objectives)
    assert [trial.values[1] for trial in study(tmp_path / "sweep").trials] == [6] * 4
    assert capsys.readouterr().out.count(" front ") == 1


def test_the_front_has_what_nothing_is_better_than():
    from efficient_lm.sweeps.searches import Objective

    def line(x, y):
        return Line({}, (), {"x": [x], "y": [y]})

    found = [line(1, 1), line(2, 3), line(3, 2), line(2, 2)]
    objectives = [Objective(name="x"), Objective(name="y", direction="maximize")]
    assert front(found, objectives) == [found[0], found[1]]
