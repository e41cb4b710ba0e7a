"""Axes: what Hydra's choices and the lists of a sweep file mean, and what is no axis."""

import pytest

from efficient_lm.composition import ConfigRoots
from efficient_lm.errors import ConfigError
from efficient_lm.overrides import parse
from efficient_lm.sweeps.axes import Span, as_text, axis_of_override, axis_of_values, zipped

ROOTS = ConfigRoots()


def overrides(axis):
    return [override for value in axis.values for override in value.overrides]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixer=attention,mamba2", ["mixer=attention", "mixer=mamba2"]),
        ("train.batch_size=choice(4,8)", ["train.batch_size=4", "train.batch_size=8"]),
        ("model.repeats=range(2,7,2)", ["model.repeats=2", "model.repeats=4", "model.repeats=6"]),
        ("train.average=null,{decay:0.9}", ["train.average=null", "train.average={decay:0.9}"]),
        ("train.freeze=[a,b],[]", ["train.freeze=[a,b]", "train.freeze=[]"]),
        ("run.name='a,b',c", ["run.name='a,b'", "run.name=c"]),
        ("+data.x=1,2", ["+data.x=1", "+data.x=2"]),
        ("nesting=glob(sa*)", ["nesting=sample", "nesting=sandwich"]),
    ],
)
def test_choices_of_a_command_line(text, expected):
    axis = axis_of_override(text, ROOTS)
    assert overrides(axis) == expected and axis.name == axis.keys[0] == text.lstrip("+").partition("=")[0]
    assert all(not parse(text).is_sweep_override() for text in expected)


def test_numbers_are_labels_of_their_own_type():
    assert [value.label for value in axis_of_override("a=1e-3,true,null,b,'c d'", ROOTS).values] == [
        0.001, True, None, "b", "c d",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a=interval(1e-4,1e-2)", Span(1e-4, 1e-2)),
        ("a=tag(log,interval(1e-4,1e-2))", Span(1e-4, 1e-2, None, True)),
        ("a=int(interval(2,8))", Span(2, 8, None, False, True)),
        ("a=range(1,7,2)", Span(1, 5, 2, False, True)),
        ("a=1,2", None),
    ],
)
def test_numbers_that_a_search_draws_from(text, span):
    assert axis_of_override(text, ROOTS).span == span


def test_a_drawn_number_becomes_an_override():
    axis = axis_of_override("a.b=int(interval(2,8))", ROOTS)
    assert axis.at(3).overrides == ("a.b=3",) and axis.at(3).choices == {"a.b": 3}
    assert [value.label for value in axis.ends] == [2, 8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mixer=attention,", "an empty choice"),
        ("mixer=,attention", "an empty choice"),
        ("mixer=choice()", "an empty choice"),
        ("a=range(1,1)", "an empty choice"),
        ("a=1,1.0,1", "1 comes twice"),
        ("a=shuffle(1,2)", "leave shuffle() out"),
        ("a=interval(2,1)", "from a number to a larger one"),
        ("a=tag(log,interval(0,1))", "of logarithms above 0"),
        ("~a=1,2", "write it by itself, ~a"),
        ("mixer=glob(zz*)", "an empty choice; valid: attention"),
        ("train.steps=glob(*)", "there is no such group"),
    ],
)
def test_what_is_no_axis(text, said):
    with pytest.raises(ConfigError) as fault:
        axis_of_override(text, ROOTS)
    assert said in str(fault.value) and "\n" not in str(fault.value)


def test_values_of_a_sweep_file():
    assert overrides(axis_of_values("a", [1, 1e-3, None, True, "x y", [1, "b"], {"kind": "c"}], ROOTS)) == [
        "a=1", "a=0.001", "a=null", "a=true", "a='x y'", "a=[1,b]", "a={kind: c}",
    ]  # fmt: skip
    assert overrides(axis_of_values("a", "range(0,3)", ROOTS)) == ["a=0", "a=1", "a=2"]


def test_names_stand_for_several_overrides():
    axis = axis_of_values("size", {"small": ["model.width=8", "mixer=gla"], "large": "model.width=16"}, ROOTS)
    assert [(value.label, value.choices, value.overrides) for value in axis.values] == [
        ("small", {"size": "small"}, ("model.width=8", "mixer=gla")),
        ("large", {"size": "large"}, ("model.width=16",)),
    ]


def test_keys_that_move_together():
    axis = zipped({"model.width": [64, 128], "mixer.heads": "2,4"}, ROOTS)
    assert axis.keys == ("model.width", "mixer.heads")
    assert [value.overrides for value in axis.values] == [
        ("model.width=64", "mixer.heads=2"), ("model.width=128", "mixer.heads=4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": []}, "axes.a: an empty choice"),
        ({"a": "b"}, "axes.a: 'b' is one value, and no choice: move it to base, as a=b"),
        ({"a": 3}, "axes.a: expected a list of values; got 3"),
        ({"a": {"b": 3}}, "axes.a.b: expected a list of overrides"),
        ({"a": {"b": ["c=1,2"]}}, "c=1,2: several values for one run"),
    ],
)
def test_what_a_sweep_file_may_not_say(given, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        axis_of_values("a", given["a"], ROOTS)


def test_keys_that_move_together_have_as_many_values():
    with pytest.raises(ConfigError, match="zip: .* as many values each; a has 2, b has 1"):
        zipped({"a": [1, 2], "b": [3]}, ROOTS)


@pytest.mark.parametrize("value", ["null", "1e-3", "a'b", "a\\b", "x,y", "", "{a}", "true", 1e-05, -3, [], {}, ["a b"]])
def test_text_is_read_back_as_it_was(value):
    read = parse(f"a={as_text(value)}").value()
    assert getattr(read, "text", read) == value or [getattr(item, "text", item) for item in read] == value
