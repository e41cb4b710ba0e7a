"""Figures against direct computation with the model's logits, window by window."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from efficient_lm.api import from_hf
from efficient_lm.data.dataset import Part, TextData, TextDataSpec
from efficient_lm.data.store import TokenStore, encode_texts
from efficient_lm.errors import ConfigError, DataError
from efficient_lm.evaluation.bits_per_byte import evaluate, make_scorer
from efficient_lm.evaluation.text import evaluate_documents
from efficient_lm.evaluation.windows import WindowSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
TEXTS = ["the people of a union", "of commerce and of peace, " * 9, "é", "treaties " * 15]


@pytest.fixture(scope="module")
def scorer(model):
    return make_scorer(model.model, model.dtype)


def nats(model, read, targets):
    """Cross entropy of each target after what was read up to it; what follows it has no influence."""
    logs = jax.nn.log_softmax(model.logits(np.array([read + [0] * (240 - len(read))]))[0])
    return -np.asarray(logs, np.float64)[np.arange(len(read)), targets]


def by_hand(model, length, stride, begin):
    """(nats, bytes of the target) of every scored token, by loops over tokens as one states it in words."""
    found = []
    for text in TEXTS:
        ids = model.tokenizer.encode(text).tolist()
        if begin == "document":
            ids = [256, *ids, 256]
            read_from = [(start, min(start + length, len(ids) - 1)) for start in range(0, len(ids) - 1, stride)]
        else:
            read_from = [(start, min(start + length, len(ids)) - 1) for start in range(0, len(ids), stride)]
        done = 0
        for start, stop in read_from:
            if stop > max(start, done):
                losses = nats(model, ids[start:stop], ids[start + 1 : stop + 1])
                first = max(done - start, 0)
                found += [(loss, int(ids[start + 1 + i] < 256)) for i, loss in enumerate(losses) if i >= first]
                done = stop + (begin == "none" and stride == length)
    return found


@pytest.mark.parametrize(
    ("length", "stride", "begin"), [(32, 8, "document"), (32, 32, "none"), (32, 8, "none"), (240, None, "none")]
)
def test_windows_by_hand(model, scorer, length, stride, begin):
    store = encode_texts(TEXTS, model.tokenizer)
    spec = WindowSpec(sequence_length=length, stride=stride, begin=begin)
    scores = evaluate_documents(scorer, model.params, store, np.arange(len(store)), spec)
    expected = by_hand(model, length, stride or length, begin)
    total, size = sum(loss for loss, _ in expected), sum(count for _, count in expected)
    assert (scores["tokens"], scores["bytes"]) == (len(expected), size)
    assert scores["loss"] == pytest.approx(total / len(expected), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(total / len(expected)), rel=1e-5)
    assert scores["documents"] == 4 and scores["stride"] == stride and scores["begin"] == begin


def test_by_default_it_is_what_training_validates_with(model, scorer):
    store = encode_texts(TEXTS, model.tokenizer)
    part = Part(store, np.arange(len(store)))
    data = TextData(TextDataSpec.model_validate({"source": {"kind": "sotu"}}), part, part, 32, 0)
    before = evaluate(scorer, model.params, data.validation_batches(4))
    spec = WindowSpec(sequence_length=32)
    after = evaluate_documents(scorer, model.params, store, np.arange(len(store)), spec, batch_size=3)
    assert (after["tokens"], after["bytes"]) == (before["tokens"], before["bytes"])
    assert after["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    for row, other in zip(after["loss_by_context"], before["loss_by_context"], strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_the_batch_size_changes_nothing(model, scorer):
    store = encode_texts(TEXTS, model.tokenizer)
    for options in ({}, {"stride": 2}, {"begin": "none"}):
        spec = WindowSpec(sequence_length=48, **options)
        scores = [evaluate_documents(scorer, model.params, store, np.arange(4), spec, size) for size in (1, 5, None)]
        assert len({score["tokens"] for score in scores}) == 1
        assert [score["loss"] for score in scores] == pytest.approx([scores[0]["loss"]] * 3, rel=1e-6)


def test_loss_by_context(model, scorer):
    store = encode_texts(["of peace " * 20], model.tokenizer)
    scores = evaluate_documents(scorer, model.params, store, np.arange(1), WindowSpec(sequence_length=24))
    rows = scores["loss_by_context"]
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 24)]
    assert [row["tokens"] for row in rows] == [8, 8 * 2, 8 * 4, 7 * 8 + 6, 7 * 9]
    mean = sum(row["loss"] * row["tokens"] for row in rows) / scores["tokens"]
    assert mean == pytest.approx(scores["loss"], rel=1e-6)
    ids = [256, *model.tokenizer.encode("of peace " * 20).tolist(), 256]
    firsts = [nats(model, ids[i : i + 1], ids[i + 1 : i + 2])[0] for i in range(0, 181, 24)]
    assert rows[0]["loss"] == pytest.approx(np.mean(firsts), rel=1e-5)


def test_a_limit_says_so(model, scorer):
    store = encode_texts(TEXTS, model.tokenizer)
    scores = evaluate_documents(scorer, model.params, store, np.arange(4), WindowSpec(sequence_length=32, limit=2))
    assert scores["windows"] == 2 and scores["tokens"] == 64
    assert scores["scored"].endswith("Of 13 windows the first 2 are scored.")


def test_compiled_shapes_are_few(model):
    scorer = make_scorer(model.model, model.dtype)
    texts = ["of peace and war " * n for n in range(1, 40)]
    store = encode_texts(texts, model.tokenizer)
    for options in ({}, {"begin": "none"}, {"stride": 128}):
        spec = WindowSpec(sequence_length=256, **options)
        scores = evaluate_documents(scorer, model.params, store, np.arange(len(store)), spec)
        assert scores["tokens"] > 10_000
    assert scorer._cache_size() <= 12


def test_bytes_are_spread_where_tokens_have_none(model, scorer):
    found = encode_texts(TEXTS, model.tokenizer)
    store = TokenStore(
        found.tokens, found.offsets, found.document_bytes * 3, found.end_of_text, found.begin_of_text, None
    )
    scores = evaluate_documents(scorer, model.params, store, np.arange(4), WindowSpec(sequence_length=32, stride=8))
    assert scores["bytes"] == 3 * sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_published_models_lose_what_the_reference_says(family):
    model, golden = from_hf(GOLDENS / family), load_file(GOLDENS / family / "golden.safetensors")
    ids = golden["input_ids"]
    rows, length = ids.shape
    store = TokenStore(ids.reshape(-1), length * np.arange(rows + 1), np.full(rows, length), 0, 0, None)
    spec = WindowSpec(sequence_length=length, begin="none")
    scores = evaluate_documents(make_scorer(model.model), model.params, store, np.arange(rows), spec)
    assert scores["tokens"] == rows * (length - 1) and scores["windows"] == rows
    assert scores["loss"] == pytest.approx(float(golden["loss"].reshape(())), rel=1e-5)


def test_faults(model, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a")
    with pytest.raises(DataError, match="no token to score"):
        model.evaluate([str(path)], begin="none")
    with pytest.raises(ConfigError, match="stride: 65 would leave out text"):
        model.evaluate([str(path)], stride=65)
    with pytest.raises(ConfigError, match="begin: "):
        model.evaluate([str(path)], begin="documents")
