"""Arms: combinations, conditions, exclusions, seeds and names."""

import pytest

from efficient_lm.composition import ConfigRoots
from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.arms import Space, arms_of
from efficient_lm.sweeps.config import read_sweep


def space(*overrides):
    config, axes = read_sweep(list(overrides), ())
    return Space.of(config, axes, ConfigRoots())


def places(*overrides):
    return [dict(candidate.choices) for candidate in space(*overrides).grid()]


def test_every_combination_is_an_arm():
    found = space("mixer=attention,gla", "train.steps=10,20", "model.width=64").grid()
    assert [candidate.overrides for candidate in found] == [
        ("model.width=64", "mixer=attention", "train.steps=10"),
        ("model.width=64", "mixer=attention", "train.steps=20"),
        ("model.width=64", "mixer=gla", "train.steps=10"),
        ("model.width=64", "mixer=gla", "train.steps=20"),
    ]


def test_zipped_keys_are_one_axis():
    assert places("mixer=attention,gla", "zip={model.width: [64,128], mixer.heads: [2,4]}") == [
        {"mixer": mixer, "model.width": width, "mixer.heads": width // 32}
        for mixer in ("attention", "gla")
        for width in (64, 128)
    ]


def test_an_axis_for_arms_where_another_has_a_value():
    given = "when=[{if: {mixer: mamba2}, axes: {mixer.state_size: [16,64]}, base: ['train.clip_norm=1']}]"
    assert places("mixer=attention,mamba2", given) == [
        {"mixer": "attention"},
        {"mixer": "mamba2", "mixer.state_size": 16},
        {"mixer": "mamba2", "mixer.state_size": 64},
    ]
    found = space("mixer=attention,mamba2", given).grid()
    assert [("train.clip_norm=1" in candidate.overrides) for candidate in found] == [False, True, True]
    assert found[1].labels == {"mixer": "mamba2", "mixer.state_size [mixer=mamba2]": 16}


def test_conditions_look_at_axes_of_conditions_before_and_at_several_values():
    found = places(
        "mixer=a,b,c",
        "when=[{if: {mixer: [a,b]}, axes: {x: [1,2]}}, {if: {x: 2}, axes: {y: [3,4]}}]",
        "exclude=[{mixer: b, y: 3}, {x: 1}]",
    )
    assert found == [
        {"mixer": "a", "x": 2, "y": 3}, {"mixer": "a", "x": 2, "y": 4}, {"mixer": "b", "x": 2, "y": 4}, {"mixer": "c"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["a=1,2", "exclude=[{b: 1}]"], "exclude.0.b: no axis; valid: a"),
        (["a=1,2", "exclude=[{a: 3}]"], "exclude.0.a: no arm has '3'; valid: 1, 2"),
        (["a=1,2", "when=[{if: {a: 9}, axes: {c: [1]}}]"], "when.0.if.a: no arm has '9'"),
        (["axes={a: [1,2]}", "when=[{if: {a: 1}, axes: {a: [1]}}]"], "when.0.axes.a: is an axis of these arms already"),
        (["a=1,2", "exclude=[{a: [1,2]}]"], "exclude: leaves no arm"),
        (["a=interval(1,2)"], "a: an interval has no end of values, and search.kind=grid takes each"),
    ],
)
def test_conditions_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError) as fault:
        space(*overrides).grid()
    assert said in str(fault.value)


def test_seeds_and_names():
    found = space("mixer=attention,gla", "optimizer.learning_rate=1e-3,0.03", "seeds=[0,7]")
    arms = arms_of(found.grid(), found.seeds)
    assert [[arm.name for arm in group] for group in arms][:2] == [
        ["attention-learning_rate_0.001-seed_0", "attention-learning_rate_0.001-seed_7"],
        ["attention-learning_rate_0.03-seed_0", "attention-learning_rate_0.03-seed_7"],
    ]
    assert arms[0][1].seed == 7 and arms[0][1].overrides[-1] == "run.seed=7"


def test_what_axes_say_of_the_budget_is_no_override_of_runs():
    found = space("budget.flops=1e12,1e13", "mixer=gla").grid()
    assert [(each.overrides, each.budget, each.choices) for each in found] == [
        (("mixer=gla",), {"flops": flops}, {"budget.flops": flops}) for flops in (1e12, 1e13)
    ]


def test_seeds_alone_and_one_seed():
    found = space("seeds=2", "model.width=64")
    assert [arm.name for arm in arms_of(found.grid(), found.seeds)[0]] == ["seed_0", "seed_1"]
    found = space("a=x,y", "seeds=1")
    assert [group[0].name for group in arms_of(found.grid(), found.seeds)] == ["x", "y"]


def test_names_that_would_be_the_same_are_told_apart_and_none_is_too_long():
    found = space("model.width=x/y,x_y", "a.width=1,2")
    names = [group[0].name for group in arms_of(found.grid(), found.seeds)]
    assert len(set(names)) == 4 and all("/" not in name and "=" not in name for name in names)
    found = space(f"a={'b' * 150}0,{'b' * 150}1")
    names = [group[0].name for group in arms_of(found.grid(), found.seeds)]
    assert len(set(names)) == 2 and max(map(len, names)) < 110


def test_samples_have_every_value_and_both_ends():
    found = space("a=1,2,3", "b=interval(0,1)", "search=random", "search.trials=5").samples()
    assert {candidate.choices["a"] for candidate in found} == {1, 2, 3}
    assert {candidate.choices["b"] for candidate in found} == {0.0, 1.0}
