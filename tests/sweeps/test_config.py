"""What a command line and a sweep file say together."""

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.config import read_sweep

FILE = """# @package _global_
name: mine
base: [model.width=64, train.steps=10]
axes: {mixer: [attention, gla], optimizer.learning_rate: [1e-3, 3e-3]}
zip: {model.repeats: [1, 2], train.batch_size: [4, 8]}
search: {pruner: {kind: median, startup: 2}}
seeds: 2
"""


@pytest.fixture
def read(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(FILE)
    return lambda *overrides: read_sweep(overrides, [str(tmp_path)])


def test_a_sweep_file(read):
    config, axes = read("sweep=mine")
    assert config.base == ("model.width=64", "train.steps=10") and config.dir == "runs/sweeps/mine"
    assert [axis.keys for axis in axes] == [
        ("mixer",), ("optimizer.learning_rate",), ("model.repeats", "train.batch_size"),
    ]  # fmt: skip
    assert [value.label for value in axes[1].values] == [0.001, 0.003]
    assert config.search.prunes and config.search.pruner.startup == 2 and config.seeds == 2


def test_the_command_line_goes_before_the_file(read):
    config, axes = read("sweep=mine", "mixer=gla", "optimizer.learning_rate=1e-2,2e-2,3e-2", "train.steps=5", "seeds=1")
    assert [axis.name for axis in axes] == ["optimizer.learning_rate", "model.repeats+train.batch_size"]
    assert config.base == ("model.width=64", "train.steps=10", "mixer=gla", "train.steps=5")
    assert len(axes[0].values) == 3 and config.seeds == 1


def test_seeds_of_runs_are_seeds_of_the_sweep():
    assert read_sweep(["a=1,2", "run.seed=3,5"], ())[0].seeds == (3, 5)
    assert read_sweep(["a=1,2", "run.seed=3"], ())[0].seeds == (3,)


def test_a_budget_may_be_an_axis():
    config, axes = read_sweep(["budget.params=1e6", "budget.flops=1e12,1e13", "mixer=attention,gla"], ())
    assert config.budget == {"params": 1e6} and [axis.name for axis in axes] == ["budget.flops", "mixer"]
    config, axes = read_sweep(["axes={budget.flops: [1e12,1e13], a: [1,2]}", "budget.flops=1e14"], ())
    assert config.budget == {"flops": 1e14} and [axis.name for axis in axes] == ["a"]


def test_a_name_is_made_of_the_axes():
    assert read_sweep(["mixer=attention,gla", "model.width=8,16"], ())[0].name == "mixer-model.width"


def test_searches_by_their_name():
    config, _ = read_sweep(["a=1,2", "search=tpe", "search.trials=4", "search.pruner=hyperband"], ())
    assert (config.search.kind, config.search.trials, config.search.pruner.kind) == ("tpe", 4, "hyperband")


def test_directions_are_known_from_names():
    config, _ = read_sweep(
        ["a=1,2", "search=nsga2", "search.trials=4",
         "search.objectives=[val_loss,val_accuracy,{name: val_accuracy, direction: minimize}]"], (),
    )  # fmt: skip
    assert [objective.optuna for objective in config.objectives] == ["minimize", "maximize", "minimize"]


def test_what_may_change_does_not_make_another_sweep():
    one, _ = read_sweep(["a=1,2", "search=tpe", "search.trials=4"], ())
    other, _ = read_sweep(["a=1,2", "search=tpe", "search.trials=9", "launcher.concurrent=3", "retry_failed=true"], ())
    assert one.identity == other.identity
    assert one.identity != read_sweep(["a=1,3", "search=tpe", "search.trials=4"], ())[0].identity


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "nothing differs: give a key several values"),
        (["model.width=64"], "nothing differs"),
        (["sweep=nothing"], "sweep=nothing: no such config; valid: "),
        (["a=1,2", "run.dir=x"], "run.dir: each run has a folder and a name of its own"),
        (["run.name=a,b"], "run.name: each run has a folder"),
        (["a=1,2", "axes={b: [1,2]}", "zip={b: [1,2]}"], "b: is on two axes"),
        (["a=1,2", "zip={b: [1,2]}", "b=3"], "b=3: b is an axis of zip or when"),
        (["a=1,2", "serch=tpe"], None),
        (["a=1,2", "search=tpe"], "search.trials: a value is needed"),
        (["a=1,2", "search=bayes"], "unknown search kind 'bayes'"),
        (["a=1,2", "search=tpe", "search.trials=0"], "search.trials: expected at least 1"),
        (["a=1,2", "search.pruner=median", "search.objectives=[x,y]"], "compares runs by one objective"),
        (["a=1,2", "seeds=[1,1]"], "one comes twice"),
        (["axes={run.seed: [1,2]}"], "axes.run.seed: is no axis"),
        (["a=1,2", "launcher=slrum"], "launcher=slrum: no such config"),
        (["a=1,2", "launcher.concurent=2"], "launcher.concurent: unknown key; did you mean 'concurrent'"),
        (["a=1,2", "name=x/y"], "name"),
        (["a=1,2", "metric="], "metric"),
    ],
)
def test_what_cannot_be_asked(overrides, said):
    if said is None:  # A key of runs, as far as the sweep can tell.
        assert read_sweep(overrides, ())[0].base == ("serch=tpe",)
        return
    with pytest.raises(ConfigError) as fault:
        read_sweep(overrides, ())
    assert said in str(fault.value)
