"""The loader: order from (seed, step) alone, exact resumption, held-out documents, faults."""

import json

import numpy as np
import pytest
import yaml

from efficient_lm.data.dataset import TextDataSpec
from efficient_lm.data.sources import FilesSource, SotuSource
from efficient_lm.data.tokenizers import BytesSpec, SotuBPESpec, TokenizerSpec
from efficient_lm.errors import ConfigError, DataError

TOKENIZER = BytesSpec().build()
LENGTH = 16


@pytest.fixture
def source(tmp_path):
    random = np.random.default_rng(0)
    texts = [f"<{i}>" + "".join(random.choice([*"abcxyz "], random.integers(0, 60))) for i in range(45)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FilesSource(paths=str(tmp_path / "a.jsonl"))


def open_data(source, seed=3, **values):
    return TextDataSpec(source=source, **values).open(TOKENIZER, LENGTH, seed)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def text_of(batches):
    return TOKENIZER.decode(int(t) for batch in batches for t in batch["targets"][batch["weights"] > 0])


@pytest.mark.parametrize("packing", ["split", "first_fit"])
def test_an_epoch_holds_the_training_documents_once(source, packing):
    data = open_data(source, packing=packing)
    summary = data.summary()
    batches = joined(take(data.train_batches(1), data.rows_per_epoch))
    assert batches["target_bytes"].sum(dtype=np.float64) == summary["train_bytes"]
    assert batches["weights"].sum() == summary["train_tokens"] + summary["train_documents"]
    assert summary["train_documents"] == 43 and summary["validation_documents"] == 2
    assert summary["rows_per_epoch"] == data.rows_per_epoch
    assert (batches["targets"] == TOKENIZER.end_of_text).sum() - (batches["weights"] == 0).sum() == 43


@pytest.mark.parametrize("packing", ["split", "first_fit"])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_order_does_not_depend_on_threads_or_processes(source, packing, threads):
    whole = take(open_data(source, packing=packing, threads=0).train_batches(8), 20)
    data = open_data(source, packing=packing, threads=threads)
    assert same(take(data.train_batches(8), 20), whole)
    parts = [data.train_batches(8, process_index=p, process_count=4) for p in range(4)]
    for expected in whole:
        shares = [next(part) for part in parts]
        assert all(share["tokens"].shape == (2, LENGTH) for share in shares)
        assert same([joined(shares)], [expected])


@pytest.mark.parametrize("packing", ["split", "first_fit"])
def test_order_does_not_depend_on_the_batch_size(source, packing):
    data = open_data(source, packing=packing)
    wide, narrow = take(data.train_batches(12), 10), take(data.train_batches(4), 30)
    assert same([joined(wide)], [joined(narrow)])


def test_order_depends_on_the_seed_and_the_epoch(source):
    data, other = open_data(source), open_data(source, seed=4)
    rows = data.rows_per_epoch
    first, second = np.split(joined(take(data.train_batches(1), 2 * rows))["tokens"], 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, joined(take(other.train_batches(1), rows))["tokens"])
    plain = open_data(source, shuffle=False)
    first, second = np.split(joined(take(plain.train_batches(1), 2 * rows))["tokens"], 2)
    assert np.array_equal(first, second)
    assert text_of(take(plain.train_batches(1), rows)).startswith("<0>")


@pytest.mark.parametrize("packing", ["split", "first_fit"])
@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_is_exact(source, packing, threads):
    data = open_data(source, packing=packing, threads=threads)
    whole = take(data.train_batches(8), 40)
    iterator = data.train_batches(8)
    take(iterator, 23)
    state = json.loads(json.dumps(iterator.get_state()))
    assert len(json.dumps(state)) < 100
    again = open_data(source, packing=packing, threads=threads).train_batches(8)
    next(again)
    again.set_state(state)
    assert same(take(again, 17), whole[23:])
    assert same(take(data.train_batches(8, start_step=23), 17), whole[23:])
    assert data.train_batches(8, start_step=23).get_state() == state


def test_validation_is_the_held_out_documents_in_order(source):
    documents = list(source.documents())
    seen = [text_of(open_data(source, seed=seed, shuffle=seed > 0).validation_batches(4)) for seed in range(3)]
    assert seen == [documents[19] + documents[39]] * 3
    data = open_data(source, packing="first_fit")
    assert text_of(data.validation_batches(2)) == documents[19] + documents[39]
    trained = text_of(take(data.train_batches(1), data.rows_per_epoch))
    assert "<19>" not in trained and "<39>" not in trained
    assert all(f"<{i}>" in trained for i in range(45) if i not in (19, 39))


def test_validation_batches_are_full_and_can_be_few(source):
    data = open_data(source, holdout_every=3)
    batches = list(data.validation_batches(4))
    assert all(batch["tokens"].shape == (4, LENGTH) for batch in batches)
    rows = -(-(data.summary()["validation_tokens"] + 15) // LENGTH)
    assert len(batches) == -(-rows // 4) and rows % 4
    assert not batches[-1]["weights"][rows % 4 :].any() and batches[-1]["weights"][rows % 4 - 1].any()
    few = list(data.validation_batches(4, limit_rows=6))
    assert len(few) == 2 and few[1]["weights"].any(axis=1).sum() == 2
    every = joined(batches)["tokens"].tolist()
    places = [every.index(row) for row in joined(few)["tokens"][:6].tolist()]
    assert places == [i * rows // 6 for i in range(6)]
    parts = [list(data.validation_batches(4, process_index=p, process_count=2)) for p in range(2)]
    assert same([joined(pair) for pair in zip(*parts, strict=True)], batches)


def test_a_validation_source_of_its_own(source, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    data = open_data(source, validation=FilesSource(paths=str(tmp_path / "held.txt")))
    assert data.summary()["train_documents"] == 45
    assert text_of(data.validation_batches(2)) == "held out"
    with pytest.raises(DataError, match="is the same files source"):
        open_data(source, validation=source)
    with pytest.raises(DataError, match=r"a\.jsonl' is both in data.source and in data.validation"):
        open_data(source, validation=FilesSource(paths=[*source.paths, str(tmp_path / "held.txt")]))


def test_no_validation_document_is_a_fault_only_when_asked_for(source):
    for values in ({"holdout_every": None}, {"holdout_every": 46}):
        data = open_data(source, **values)
        assert data.summary()["validation_documents"] == 0 and data.summary()["train_documents"] == 45
        with pytest.raises(DataError, match="no validation documents: the files source has 45"):
            data.validation_batches(2)


def test_no_training_document(source):
    with pytest.raises(DataError, match="no document to train on besides the 45 held out"):
        open_data(source, holdout_every=1)


def test_processes_that_do_not_divide_the_batch(source):
    with pytest.raises(ConfigError, match="8 rows cannot be divided among 3"):
        open_data(source).train_batches(8, process_count=3)


def test_embedded_corpus_with_its_tokenizer():
    data = TextDataSpec(source=SotuSource()).open(SotuBPESpec().build(), 256, 0)
    summary = data.summary()
    assert (summary["train_documents"], summary["validation_documents"]) == (222, 11)
    assert summary["train_bytes"] + summary["validation_bytes"] == 10_761_202
    validation = joined(list(data.validation_batches(16)))
    assert validation["target_bytes"].sum(dtype=np.float64) == summary["validation_bytes"] == 517_460
    assert 4.3 < summary["validation_bytes"] / summary["validation_tokens"] < 4.5


@pytest.mark.parametrize("name", ["sotu", "files"])
def test_data_configs_are_specs(request, name):
    values = yaml.safe_load((request.config.rootpath / "configs" / "data" / f"{name}.yaml").read_text())
    if name == "files":
        assert values["source"]["paths"] == "???"
        values["source"]["paths"] = ["a.txt"]
    spec = TextDataSpec.model_validate(values)
    assert spec.source.kind == name
    assert TextDataSpec.model_validate(spec.dump()) == spec
    assert set(values) == set(TextDataSpec.keys())


@pytest.mark.parametrize("name", ["bytes", "sotu_bpe", "file"])
def test_tokenizer_configs_are_specs(request, name):
    values = yaml.safe_load((request.config.rootpath / "configs" / "tokenizer" / f"{name}.yaml").read_text())
    assert TokenizerSpec.lookup(name).model_validate(values).kind == name
