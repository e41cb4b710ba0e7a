"""What runs differ in, arms, and curves put together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efficient_lm.sweeps.report.arms import arms_of, differences, natural, said
from efficient_lm.sweeps.report.curves import envelope
from efficient_lm.sweeps.report.measures import BY_NAME
from efficient_lm.sweeps.report.runs import Run

LOSS = BY_NAME["val_loss"]


def run(name, loss=3.0, rate=1e-3, seed=0, choices=None, state="finished", **config):
    """A run in memory, of 11 points in a straight line down to its loss."""
    tokens = np.linspace(0, 100, 11)
    config = {"optimizer.learning_rate": rate, "run.seed": seed, "run.name": name, "run.dir": f"runs/{name}", **config}
    return Run(
        path=Path("runs") / name, name=name, state=state, config=config, choices=choices, seed=seed, learning_rate=rate,
        training={"tokens": tokens, "seconds": tokens / 10, "loss": loss + 5 - tokens / 20},
        figures={"val_loss": loss, "training_flops_per_token": 7.0}, sweep="s" if choices else "",
    )  # fmt: skip


def labels(runs):
    return [arm.label for arm in arms_of(runs).arms]


def test_arms_of_a_sweep_are_its_choices_without_rates_and_seeds():
    runs = [
        run(f"{mixer}-{rate}-{seed}", rate=rate, seed=seed, choices={
            "mixer": mixer, "model.width": width, "optimizer.learning_rate": rate})
        for mixer, width in (("gla", 64), ("gla", 128), ("attention", 64)) for rate in (1e-3, 3e-3) for seed in (0, 1)
    ]  # fmt: skip
    arms = arms_of(runs)
    assert labels(runs) == ["attention · width 64", "gla · width 64", "gla · width 128"]
    assert arms.axes == ("mixer", "model.width") and [arm.family for arm in arms.arms] == ["attention", "gla", "gla"]
    assert [setting.rate for setting in arms.arms[0].settings] == [1e-3, 3e-3]
    assert [len(setting.runs) for setting in arms.arms[0].settings] == [2, 2]


def test_sweeps_side_by_side_are_told_apart():
    one, two = (replace(run(name, choices={"mixer": "gla"}), sweep=name) for name in ("first", "second"))
    assert labels([one, two]) == ["first · gla", "second · gla"]


def test_sizes_of_isoflop_runs_are_one_family():
    runs = [run(f"{number}", choices={"mixer": "gla", "isoflop": f"C1e13-N{number}e6"}) for number in (1, 2)]
    assert {arm.family for arm in arms_of(runs).arms} == {"gla"} and len(arms_of(runs).arms) == 2


def test_arms_of_plain_runs_are_what_their_configs_differ_in():
    kind, heads = "model.blocks.layer.mixer.kind", "model.blocks.layer.mixer.heads"
    runs = [run(f"{mixer}{seed}", seed=seed, **{kind: mixer, **({heads: 4} if mixer == "gla" else {}), "steps": 5})
            for mixer in ("gla", "mamba2") for seed in (0, 1)]  # fmt: skip
    arms = arms_of(runs)
    # The kind alone tells them apart, so that nothing else need be said.
    assert labels(runs) == ["gla", "mamba2"] and arms.axes == (kind,)
    assert [len(arm.runs) for arm in arms.arms] == [2, 2]
    # With one run each, the names that their owner gave them are the better ones.
    assert labels([runs[0], runs[2]]) == ["gla0", "mamba20"]
    assert labels([runs[0]]) == ["gla0"] and len(arms_of(runs[:2]).arms) == 1
    assert labels([run("a", wide=True), run("b", wide=True), run("c", wide=False, seed=1)]) == [
        "wide false",
        "wide true",
    ]


def test_other_rates_than_the_optimizer_s_own_make_arms():
    group = "optimizer.groups.embedding.learning_rate"
    assert labels([run(f"{rate}{seed}", seed=seed, **{group: rate}) for rate in (1e-3, 2e-3) for seed in (0, 1)]) == [
        "learning_rate 0.001", "learning_rate 0.002"]  # fmt: skip
    (one,) = arms_of([run("a", choices={"learning_rate": 1}), run("b", choices={"learning_rate": 2})]).arms
    assert len(one.runs) == 2


def test_numbers_that_no_float_holds_are_text():
    assert labels([run("a", choices={"x": 10**400}), run("b", choices={"x": 2})])[0] == "x 2"


def test_a_run_without_a_config_is_by_itself():
    broken = replace(run("broken"), config={})
    assert labels([run("a", width=1), run("b", width=1), run("c", width=2), broken]) == ["width 1", "width 2", "broken"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mixer", "gla", "gla"),
        ("model.width", 64, "width 64"),
        ("optimizer.eps", 1e-8, "eps 1e-08"),
        ("model.blocks.layer.mixer.kind", None, "mixer null"),
        ("train.tied", True, "tied true"),
        ("model.layout", '["a", "b"]', '["a", "b"]'),
        ("width", "64", "width 64"),
    ],
)
def test_values_speak_for_themselves_or_with_their_key(name, value, text):
    assert said(name, value) == text


def test_legends_have_a_colour_for_each_value_of_the_longest_axis():
    choices = [(mixer, ffn) for mixer in ("a1", "b1", "c1") for ffn in ("moe", "swiglu")]
    arms = arms_of([run(f"{mixer}{ffn}", choices={"mixer": mixer, "ffn": ffn}) for mixer, ffn in choices])
    colors = [style.color for style in arms.legend.values()]
    assert colors == [0, 0, 1, 1, 2, 2]
    assert len({(style.color, style.mark) for style in arms.legend.values()}) == 6
    assert len({(style.color, style.dash) for style in arms.legend.values()}) == 6
    many = arms_of([run(f"{i}", choices={"mixer": f"m{i % 20}", "width": i // 20}) for i in range(40)])
    assert list(many.legend) == [f"m{i}" for i in range(20)]
    assert len(set(many.legend.values())) == 20


def test_the_best_learning_rate_is_that_of_the_best_mean_of_runs_that_ended():
    runs = [run("a", 3.0, 1e-3), run("b", 3.2, 1e-3, 1), run("c", 3.05, 3e-3), run("d", 3.05, 3e-3, 1),
            run("e", 1.0, 1e-2, state="failed")]  # fmt: skip
    (arm,) = arms_of([replace(each, choices={"mixer": "gla"}) for each in runs]).arms
    best = arm.best(LOSS)
    assert best.rate == 3e-3 and best.mean("val_loss") == pytest.approx(3.05) and best.values("none") == []
    assert arm.best(BY_NAME["val_accuracy"]) is None


def test_differences_leave_out_who_a_run_is():
    configs = [
        {"run.name": "a", "run.seed": 0, "width": 1, "mixer.kind": "gla", "same": 2, "mixer.heads": 1},
        {"run.name": "b", "run.seed": 1, "width": 2, "mixer.kind": "mamba2", "same": 2, "tracker.kind": "x"},
        {},
    ]
    # What all configs have comes first, and kinds before all else.
    assert differences(configs) == ["mixer.kind", "run.seed", "width", "mixer.heads"]
    assert differences(configs[:1]) == []


def envelope_of(*runs, along="tokens"):
    (arm,) = arms_of([replace(each, choices={"mixer": "gla"}) for each in runs]).arms
    return envelope(arm, along, "loss")


def test_an_envelope_is_the_best_rate_wherever_one_stops():
    tokens = np.linspace(0, 100, 11)
    quick = replace(run("quick", rate=1e-2), training={"tokens": tokens, "loss": 4 - tokens / 100})
    slow = replace(run("slow", rate=1e-3), training={"tokens": tokens, "loss": 5 - tokens / 25})
    found = envelope_of(quick, slow)
    expected = np.minimum(4 - found.along / 100, 5 - found.along / 25)
    np.testing.assert_allclose(found.mean, expected)
    assert found.rates[0] == 1e-2 and found.rates[-1] == 1e-3 and (found.low == found.high).all()


def test_an_envelope_is_a_mean_of_seeds_with_their_range():
    found = envelope_of(run("a", 3.0), run("b", 3.4, seed=1), run("c", 0.0, seed=2, state="interrupted"))
    np.testing.assert_allclose(found.mean, 3.2 + 5 - found.along / 20)
    np.testing.assert_allclose([found.high - found.mean, found.mean - found.low], 0.2)


def test_a_setting_counts_where_all_its_seeds_have_come():
    short = run("b", 0.0, seed=1)
    short = replace(short, training={name: values[:5] for name, values in short.training.items()})
    found = envelope_of(run("a", 3.0), short)
    assert found.along.max() <= 40 and not np.isnan(found.mean).any()
    along_flops = envelope_of(run("a", 3.0), along="flops")
    assert along_flops.along.max() == 700
    assert envelope_of(run("a", state="failed")) is None
    assert envelope_of(replace(run("a"), training={"tokens": np.array([np.nan]), "loss": np.array([1.0])})) is None


def test_numbers_in_words_sort_by_their_size():
    assert sorted(["4 of 256", "16 of 64", "8 of 128", "dense", 10, 9.5, "1e-3"], key=natural) == [
        "1e-3", 9.5, 10, "4 of 256", "8 of 128", "16 of 64", "dense",
    ]  # fmt: skip
