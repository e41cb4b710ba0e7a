"""What is known of a candidate before it runs, and which ones are refused."""

import sys
import types

import pytest

from efficient_lm.errors import ConfigError, DataError, UserError
from efficient_lm.spec import Positive, Spec
from efficient_lm.sweeps.checking import Checked, Checker, Known, Question, check

SMALL = (
    "model.width=16", "model.repeats=2", "mixer.heads=2", "tokenizer=bytes", "train.steps=3", "train.batch_size=2",
    "train.sequence_length=32", "data=files", "data.holdout_every=4",
)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one and one are two\n" * 200)
    return (*SMALL, f"data.source.paths={path}")


def test_figures_that_follow_from_the_config(small):
    found = check(Question((*small, "run.seed=3"), figures=("val_loss", "cache_bytes")))
    assert (found.seed, found.steps, found.overrides, found.known) == (3, 3, (), Known())
    # Keys and values, and where each stands in its text.
    assert found.figures["parameters"] > 1000 and 1 < found.figures["cache_bytes"] / (2 * 2 * 32 * 16 * 4) < 1.1
    assert found.figures["training_flops"] > 3 * 2 * 32 * found.figures["flops_per_token"]
    assert found.config["model"]["vocab_size"] > 255 and not {"run", "tracker"} & set(found.config)


def test_runs_that_differ_in_name_and_seed_are_the_same_candidate(small):
    one, other = (check(Question((*small, f"run.seed={seed}", f"run.name=n{seed}"))) for seed in (1, 2))
    assert one.config == other.config and one.seed != other.seed


def test_the_memory_is_that_of_the_compiled_step(small):
    found = check(Question(small, memory=True))
    assert found.known.memory_bytes > 3 * 4 * found.figures["parameters"] and found.known.device_bytes is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mixr=gla"], "mixr: unknown key; did you mean 'mixer'"),
        (["mixer=glaa"], "mixer=glaa: no such config; did you mean 'gla'"),
        (["mixer.haeds=2"], "mixer.haeds: unknown key; did you mean 'heads'"),
        (["model=mamba2_tiny", "mixer=gla"], "mixer=gla: nothing reads it"),
        (["mixer.heads=3"], "heads"),
        (["train.accumulate=5"], "train.accumulate: 5 micro-batches do not divide"),
    ],
)
def test_whatever_train_would_refuse_is_refused(small, overrides, said):
    plain = [text for text in small if not text.startswith(("model.", "mixer.")) or overrides[0] != "model=mamba2_tiny"]
    with pytest.raises(ConfigError) as fault:
        check(Question((*plain, *overrides)))
    assert said in str(fault.value)


def test_data_that_is_not_there_is_refused_here_and_left_to_other_machines(small):
    missing = (*small, "data.source.paths=/nowhere/text.txt")
    with pytest.raises(DataError):
        check(Question(missing))
    assert check(Question(missing, remote=True)).figures["parameters"] > 1000


def test_a_figure_that_runs_will_not_have_is_refused(small):
    with pytest.raises(ConfigError, match="metric: runs of such data have no 'val_los'; did you mean 'val_loss'"):
        check(Question(small, figures=("val_los",)))
    assert check(Question(small, figures=("val_loss_0.5",)))


def test_stopping_early_needs_evaluations(small):
    with pytest.raises(ConfigError, match="train.evaluate_every says when, and is null"):
        check(Question((*small, "train.evaluate_every=null"), prunes=True))


@pytest.mark.parametrize(
    ("tracker", "added"),
    [
        (["tracker=wandb"], ("tracker.group=mine",)),
        (["tracker=wandb", "tracker.group=other"], ()),
        (["tracker=tensorboard_wandb"], ("tracker.trackers.wandb.group=mine",)),
        (["tracker=tensorboard"], ()),
    ],
)
def test_runs_are_grouped_in_their_tracker(small, tracker, added):
    assert check(Question((*small, *tracker), group="mine")).overrides == added
    assert check(Question((*small, *tracker, *added), group="mine"))


@pytest.fixture
def budgets(monkeypatch):
    """Stands in for what resizes candidates."""

    class BudgetSpec(Spec):
        params: Positive

    def fit(values, budget):
        if budget.params < 10:
            raise ConfigError("budget.params: nothing is so small")
        columns = {"width": 32, "before": values["model"]["width"]}
        return types.SimpleNamespace(overrides=["model.width=32"], columns=columns)

    module = types.SimpleNamespace(BudgetSpec=BudgetSpec, fit=fit)
    monkeypatch.setitem(sys.modules, "efficient_lm.sweeps.budgets", module)


def test_a_candidate_is_brought_within_the_budget(small, budgets):
    found = check(Question(small, budget={"params": 1e5}))
    assert found.known == Known(("model.width=32",), {"width": 32, "before": 16})
    assert found.config["model"]["width"] == 32
    again = Question(small, budget={"params": 1}, known=Known(("model.width=48",), {"width": 48}))
    assert check(again).config["model"]["width"] == 48 and check(again).known == again.known
    with pytest.raises(ConfigError, match="nothing is so small"):
        check(Question(small, budget={"params": 1}))
    with pytest.raises(ConfigError, match="budget.parms: unknown key"):
        check(Question(small, budget={"parms": 1}))


@pytest.mark.slow
def test_a_process_of_its_own_answers_and_starts_again_when_it_was_killed(small):
    checker = Checker()
    good, bad = checker.check([Question(small), Question((*small, "mixr=gla"))])
    assert isinstance(good, Checked) and isinstance(bad, UserError) and "mixr" in str(bad)
    checker._process.kill()
    (lost,) = checker.check([Question(small)])
    assert isinstance(lost, UserError) and "exit status -9" in str(lost)
    (again,) = checker.check([Question(small)])
    assert again == good
    checker.close()
    checker.close()
