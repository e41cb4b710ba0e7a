"""Every answer of every task against a solver that reads the row up to the question and nothing else."""

from itertools import permutations

import numpy as np
import pytest
import yaml

from efficient_lm.composition import builtin_configs
from efficient_lm.config import load_run_config
from efficient_lm.data.base import DataSpec
from efficient_lm.data.synthetic.base import TRAINING, arrays
from efficient_lm.data.synthetic.row_random import RowRandom
from efficient_lm.data.synthetic.word_problem import multiplication_table
from efficient_lm.errors import ConfigError

SEED = 5


def batch(kind, count=64, **options):
    spec = DataSpec.lookup(kind)(**options)
    return spec, arrays(spec.rows(RowRandom(SEED, TRAINING, np.arange(count))), spec.length)


def multi_query_recall(read, spec):
    context = read[: 2 * spec.pairs]
    return dict(zip(context[::2], context[1::2], strict=True))[read[-1]]


def selective_copying(read, spec):
    marker = spec.vocabulary - 1
    return [token for token in read if 0 < token < marker][read.count(marker) - 1]


def induction_heads(read, spec):
    special = spec.vocabulary - 1
    assert read[-1] == special
    return read[read.index(special) + 1]


def phonebook(read, spec):
    text = "".join("0123456789:\n?"[token] if token < 13 else chr(ord("a") + token - 13) for token in read)
    book, question = text.split("?")
    name, said = question.split(":")
    return int(dict(line.split(":") for line in book.splitlines())[name][len(said)])


def passkey(read, spec):
    key = read[read.index(10) + 1 :][: spec.digits]
    return key[len(read) - read.index(11) - 1]


def noisy_recall(read, spec):
    slots = list(zip(read[:-1:2], read[1:-1:2], strict=False))
    return dict(reversed(slots))[read[-1]]


def fuzzy_recall(read, spec):
    half, pairs = spec.vocabulary // 2, []
    for before, token in zip([half, *read], read, strict=False):
        if token < half and before >= half:
            pairs.append(((), ()))
        key, value = pairs[-1]
        pairs[-1] = ((*key, token), value) if token < half else (key, (*value, token))
    key, said = pairs.pop()
    return dict(pairs)[key][len(said)]


def compression(read, spec):
    special = spec.vocabulary - 1
    return [token for token in read if token != special][read.count(special) - 1]


def memorization(read, spec):
    assert read[-1] == spec.vocab_size - 1
    return spec.values(SEED)[read[-2]]


def word_problem(read, spec):
    family, size = spec.group[0], int(spec.group[1:])
    if family == "z":
        return sum(read) % size
    signs = [(-1) ** sum(p[a] > p[b] for b in range(size) for a in range(b)) for p in permutations(range(size))]
    elements = [p for p, sign in zip(permutations(range(size)), signs, strict=True) if family == "s" or sign == 1]
    state = tuple(range(size))
    for token in read:
        state = tuple(elements[token][i] for i in state)
    return elements.index(state)


CASES = [
    ("multi_query_recall", multi_query_recall, {}, 8),
    ("multi_query_recall", multi_query_recall, {"length": 33, "pairs": 8, "vocabulary": 19, "power": 1.0}, 8),
    ("selective_copying", selective_copying, {}, 16),
    ("selective_copying", selective_copying, {"length": 6, "items": 3, "vocabulary": 3}, 3),
    ("induction_heads", induction_heads, {}, 1),
    ("induction_heads", induction_heads, {"length": 21, "vocabulary": 4, "answers": 10}, 10),
    ("phonebook", phonebook, {}, 4),
    ("phonebook", phonebook, {"length": 64, "entries": 3, "name_length": 1, "letters": 3, "number_length": 5}, 5),
    ("passkey", passkey, {}, 5),
    ("passkey", passkey, {"length": 40, "shortest": 7, "digits": 3, "filler": 3}, 3),
    ("noisy_recall", noisy_recall, {"length": 65}, None),
    ("noisy_recall", noisy_recall, {"length": 4, "vocabulary": 8, "noise": 0.9}, 1),
    ("fuzzy_recall", fuzzy_recall, {}, None),
    ("fuzzy_recall", fuzzy_recall, {"length": 12, "vocabulary": 12}, None),
    ("fuzzy_recall", fuzzy_recall, {"length": 90, "vocabulary": 4, "key_size": 2, "value_size": 1}, None),
    ("compression", compression, {"length": 31}, 15),
    ("memorization", memorization, {"vocabulary": 12}, 16),
    ("word_problem", word_problem, {"group": "s5", "length": 13}, 13),
    ("word_problem", word_problem, {"group": "a4", "length": 9, "answers": "last"}, 1),
    ("word_problem", word_problem, {"group": "z2", "length": 33}, 33),
]


@pytest.mark.parametrize(("kind", "solve", "options", "answers"), CASES)
def test_what_was_read_determines_every_answer(kind, solve, options, answers):
    spec, made = batch(kind, **options)
    used = made["segment_ids"].sum(1)
    assert made["tokens"].shape == (64, spec.length) and (used >= 1).all()
    assert made["tokens"].min() >= 0 and made["tokens"].max() < spec.vocab_size
    counts = made["weights"].sum(1)
    assert (counts == answers).all() if answers else (counts >= 1).all()
    assert set(np.unique(made["weights"])) <= {0, 1} and not made["weights"][made["segment_ids"] == 0].any()
    for row in range(64):
        read = made["tokens"][row].tolist()
        for place in np.flatnonzero(made["weights"][row]):
            assert solve(read[: place + 1], spec) == made["targets"][row, place] < spec.vocab_size, (row, place)
        assert (made["positions"][row, : used[row]] == np.arange(used[row])).all()


@pytest.mark.parametrize("kind", sorted({case[0] for case in CASES}))
def test_a_row_does_not_depend_on_its_batch(kind):
    spec, made = batch(kind, 8)
    again = arrays(spec.rows(RowRandom(SEED, TRAINING, np.array([6, 2]))), spec.length)
    assert all(np.array_equal(again[name], made[name][[6, 2]]) for name in made)


def test_queries_stand_at_power_law_gaps():
    spec, made = batch("multi_query_recall", 8000, length=40, pairs=4, power=0.5, random_filler=False)
    slots = (np.arange(40) - 8) // 2
    queried = made["weights"].sum(0) > 0
    assert queried[8::2].all() and queried.sum() == 16
    # The query of the first key is drawn first, so its slot follows the law itself.
    first = made["tokens"] == made["tokens"][:, :1]
    found = np.bincount(slots[np.argmax(first[:, 8:], axis=1) + 8], minlength=16) / 8000
    law = np.arange(1, 17) ** -0.5
    assert np.allclose(found, law / law.sum(), atol=0.012)
    assert (made["tokens"][:, 8:][made["weights"][:, 8:] == 0] == 0).all()
    keys, values = made["tokens"][:, :8:2], made["tokens"][:, 1:8:2]
    assert (keys.min(), keys.max(), values.min(), values.max()) == (1, 127, 128, 255)
    for drawn in (keys, values):
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()


def test_places_are_drawn_evenly():
    _, made = batch("selective_copying", 4000, length=20, items=4)
    assert np.allclose((made["tokens"][:, :16] > 0).mean(0), 4 / 16, atol=0.03)
    _, made = batch("passkey", 4000, length=20, digits=2)
    assert np.allclose((made["tokens"] == 10).mean(0)[:16], 1 / 16, atol=0.015)
    _, made = batch("induction_heads", 4000, length=20)
    assert np.allclose((made["tokens"] == 15).mean(0)[:18], 1 / 18, atol=0.015)
    _, made = batch("noisy_recall", 2000, noise=0.25)
    assert (made["tokens"] >= 16).mean() == pytest.approx(0.25 * 62 / 64, abs=0.01)
    _, made = batch("passkey", 4000, length=12, digits=2, shortest=5)
    assert np.allclose(np.bincount(made["segment_ids"].sum(1))[5:] / 4000, 1 / 8, atol=0.02)


def test_memorized_values_stand_in_no_row_and_are_one_to_one():
    spec, made = batch("memorization", vocabulary=20)
    assert spec.pairs == 9 and sorted(spec.values(SEED)) == list(range(9, 18))
    assert set(np.unique(made["tokens"])) == {*range(9), 18}
    assert spec.values(SEED).tolist() != spec.values(SEED + 1).tolist()


@pytest.mark.parametrize(("group", "order", "abelian"), [("z7", 7, True), ("s3", 6, False), ("a4", 12, False)])
def test_groups_are_groups(group, order, abelian):
    table = multiplication_table(group)
    assert table.shape == (order, order) and (table[0] == np.arange(order)).all() and (table[:, 0] == table[0]).all()
    assert all(sorted(line) == list(range(order)) for line in [*table, *table.T])
    assert (table[table, :] == table[:, table]).all() and (table == table.T).all() == abelian
    assert [len(multiplication_table(name)) for name in ("s4", "s5", "a5")] == [24, 120, 60]


TASKS = [file for file in sorted((builtin_configs() / "data").glob("*.yaml")) if file.stem not in ("sotu", "files")]


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_data_configs_say_every_option_and_its_default(file):
    values = yaml.safe_load(file.read_text())
    spec = DataSpec.lookup(values["kind"])(**values)
    assert set(values) == set(spec.keys())
    assert spec == type(spec)(**({"group": "z2"} if file.stem == "parity" else {}))


def test_every_kind_has_a_config():
    assert {yaml.safe_load(file.read_text())["kind"] for file in TASKS} | {"text"} == set(DataSpec.kinds)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=multi_query_recall", "data.pairs=17"], r"data.pairs: 17 is too many: .* of data.length=64; at most 16"),
        (["data=multi_query_recall", "data.vocabulary=16"], r"data.vocabulary: 16 is too small: .*; at least 18"),
        (["data=multi_query_recall", "data.length=3"], r"data.length: 3 is too small: .*; at least 4"),
        (["data=multi_query_recall", "data.pears=2"], r"data.pears: unknown key; did you mean 'pairs'"),
        (["data=multi_query_recal"], r"no such config; did you mean 'multi_query_recall'"),
        (["data=selective_copying", "data.items=129"], r"data.items: 129 is too many: .*; at most 128"),
        (["data=induction_heads", "data.answers=128"], r"data.answers: 128 is too many: .*; at most 127"),
        (["data=phonebook", "data.entries=32"], r"data.entries: 32 is too many: each takes 8 .*; at most 31"),
        (["data=phonebook", "data.letters=3"], r"data.name_length: 2 of 3 letters make 9 names for 31 entries"),
        (["data=passkey", "data.length=10"], r"data.length: 10 is too small: .*; at least 11"),
        (["data=passkey", "data.shortest=300"], r"data.shortest: 300 is too many: .*; at most 256"),
        (["data=noisy_recall", "data.noise=1"], r"data.noise: 1.0 leaves no pair to recall; below 1"),
        (["data=fuzzy_recall", "data.vocabulary=5"], r"data.vocabulary: 5 is too small: .*; at least 6"),
        (["data=fuzzy_recall", "data.vocabulary=512"], r"data.vocabulary: 512 entries make too many motifs"),
        (["data=compression", "data.vocabulary=2"], r"data.vocabulary: 2 is too small"),
        (["data=memorization", "data.vocabulary=4"], r"data.vocabulary: 4 is too small"),
        (["data=word_problem", "data.group=s6"], r"data.group: 's6' is not valid; valid: a4, a5, s3, s4, s5"),
        (["data=parity", "train.sequence_length=12"], r"train.sequence_length: 12, but data.length=64 decides"),
        (["train.stop_at_accuracy=0.5"], r"train.stop_at_accuracy: text has no answers to count"),
        (["data=parity", "train.stop_at_accuracy=0.5", "train.evaluate_every=null"], r"set train.evaluate_every"),
    ],
)  # fmt: skip
def test_faults(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_run_config(overrides)
