"""Batches of tasks: the order of rows, resuming, processes, validation, and how a run is composed."""

import numpy as np
import pytest

from efficient_lm.config import load_run_config, read_config, save_config
from efficient_lm.data.base import DataSpec
from efficient_lm.data.tokenizers import AbsentTokenizer, ByteTokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.training.setup import with_vocabulary


def opened(kind="multi_query_recall", length=16, seed=0, **options):
    return DataSpec.lookup(kind)(**options).open(AbsentTokenizer(), length, seed)


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def same(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left | right)


SMALL = {"pairs": 2, "vocabulary": 64}


def test_the_order_is_a_function_of_seed_and_step():
    data = opened(**SMALL)
    whole = take(data.train_batches(4), 6)
    assert same(whole[3], take(opened(**SMALL).train_batches(4, start_step=3), 1)[0])
    assert not same(whole[0], whole[1]) and not same(whole[0], take(opened(seed=1, **SMALL).train_batches(4), 1)[0])
    halves = [take(data.train_batches(4, process_index=part, process_count=2), 2)[1] for part in range(2)]
    assert same(whole[1], {name: np.concatenate([half[name] for half in halves]) for name in whole[1]})
    pairs = take(data.train_batches(2, start_step=4), 2)
    assert same(whole[2], {name: np.concatenate([half[name] for half in pairs]) for name in whole[2]})
    with pytest.raises(ConfigError, match="3 rows cannot be divided among 2 processes"):
        data.train_batches(3, process_count=2)


def test_the_state_of_the_loader_resumes():
    iterator = opened(**SMALL).train_batches(4)
    for _ in range(3):
        next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    iterator.close()
    fresh = opened(**SMALL).train_batches(4)
    fresh.set_state(state)
    assert same(expected, take(fresh, 1)[0])


def rows_of(batches):
    return [tuple(row) for batch in batches for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
            if segments.any()]  # fmt: skip


def test_training_and_validation_have_no_row_in_common():
    data = opened(length=32, validation_examples=500)
    training, validation = rows_of(take(data.train_batches(50), 10)), rows_of(data.validation_batches(50))
    assert len(set(training) | set(validation)) == 1000


def test_validation_is_the_same_each_time_and_filled_up():
    data = opened(validation_examples=10, **SMALL)
    batches = list(data.validation_batches(4))
    assert [batch["weights"].any(1).sum() for batch in batches] == [4, 4, 2] and batches[2]["tokens"].shape == (4, 16)
    assert not batches[2]["segment_ids"][2:].any()
    assert rows_of(batches) == rows_of(data.validation_batches(5))
    assert rows_of(data.validation_batches(4, limit_rows=3)) == rows_of(batches)[:3]
    assert rows_of(data.validation_batches(4, limit_rows=99)) == rows_of(batches)
    assert data.summary() == {"train_examples": None, "validation_examples": 10} and data.has_validation


def test_a_number_of_examples_makes_epochs():
    data = opened(examples=10, **SMALL)
    first, second, third = (rows_of(take(data.train_batches(5, start_step=step), 2)) for step in (0, 2, 4))
    assert len(set(first)) == 10 and set(first) == set(second) == set(third)
    assert first != second != third
    assert set(first) == set(rows_of(take(opened(**SMALL).train_batches(10), 1)))


def test_composed_alone_it_has_no_tokenizer_and_its_own_length_and_vocabulary(tmp_path):
    config = load_run_config(["data=induction_heads", "data.length=48"])
    assert config.tokenizer.kind == "none" and config.train.sequence_length == 48
    assert with_vocabulary(config, AbsentTokenizer()).model.vocab_size == 16
    save_config(tmp_path / "config.yaml", config)
    assert read_config(tmp_path / "config.yaml") == config
    assert load_run_config(["model.width=64"]).train.sequence_length == 256
    with pytest.raises(ConfigError, match="model.vocab_size: 8 is smaller than the data's 16"):
        with_vocabulary(load_run_config(["data=induction_heads", "model.vocab_size=8"]), AbsentTokenizer())


def test_a_tokenizer_of_text_is_refused():
    config = load_run_config(["data=parity", "tokenizer=bytes"])
    assert config.tokenizer.kind == "bytes"
    with pytest.raises(ConfigError, match="tokenizer: data of the kind 'word_problem' is made of token ids"):
        config.data.open(ByteTokenizer(), 64, 0)


def test_changes_keep_the_rest_of_the_data():
    spec = DataSpec.lookup("multi_query_recall")(**SMALL)
    assert spec.changed({"length": 128}).length == 128 and spec.changed({"length": 128}).vocabulary == 64
    with pytest.raises(ConfigError, match="data.pairs: 17 is too many"):
        spec.changed({"pairs": 17})
    text = load_run_config(["data=files", "data.source.paths=[a.txt]"]).data
    changed = text.changed({"source": {"paths": ["b.txt"]}, "holdout_every": 3})
    assert changed.source.paths == ("b.txt",) and changed.source.text_field == "text" and changed.holdout_every == 3


def test_data_without_a_kind_is_text():
    values = load_run_config().dump()
    del values["data"]["kind"]
    from efficient_lm.config import RunConfig
    from efficient_lm.validation import validate

    assert validate(RunConfig, values) == load_run_config()
