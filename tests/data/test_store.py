"""Token store: what it holds, that the cache is reused, rebuilt when torn, and never needed."""

import json
import logging
import os

import numpy as np
import pytest

from efficient_lm.data import store as module
from efficient_lm.data.sources import FilesSource
from efficient_lm.data.store import encode_texts, open_store
from efficient_lm.data.tokenizers import BytesSpec, SotuBPESpec
from efficient_lm.errors import DataError

TEXTS = ["one", "zwei é", "trois " * 50]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return FilesSource(paths=str(tmp_path / "a.jsonl"))


@pytest.fixture
def forbidden(monkeypatch):
    """Make any encoding fail, so that only the cache can answer."""

    def refuse(*arguments):
        raise AssertionError("encoded again")

    return lambda: monkeypatch.setattr(module, "_encode", refuse)


def texts(store, tokenizer):
    return [tokenizer.decode(store.tokens[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def entries(cache):
    return sorted((cache / "tokens").iterdir())


def test_what_a_store_holds(source):
    tokenizer = SotuBPESpec().build()
    store = open_store(source, tokenizer)
    assert texts(store, tokenizer) == TEXTS
    assert store.tokens.dtype == np.uint16 and store.offsets.dtype == np.int64
    assert store.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert store.byte_lengths is tokenizer.byte_lengths
    assert np.array_equal(store.tokens[:], encode_texts(TEXTS, tokenizer).tokens)


def test_wide_vocabularies_take_32_bits():
    tokenizer = BytesSpec().build()
    tokenizer.vocab_size = 65_537
    assert encode_texts(TEXTS, tokenizer).tokens.dtype == np.uint32


def test_byte_lengths_are_dropped_when_they_do_not_add_up():
    tokenizer = BytesSpec().build()
    tokenizer.byte_lengths = tokenizer.byte_lengths * 2
    assert encode_texts(TEXTS, tokenizer).byte_lengths is None


def test_cache_is_reused_per_source_and_tokenizer(source, cache, forbidden, tmp_path):
    tokenizer = SotuBPESpec().build()
    open_store(source, tokenizer)
    open_store(source, BytesSpec().build())
    assert len(entries(cache)) == 2
    forbidden()
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    with pytest.raises(AssertionError, match="encoded again"):
        open_store(source, tokenizer)


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.npy", "document_bytes.npy", "entry.json"])
@pytest.mark.parametrize("tear", ["cut", "empty", "gone"])
def test_torn_cache_is_rebuilt(source, cache, file, tear, forbidden):
    tokenizer = BytesSpec().build()
    open_store(source, tokenizer)
    path = entries(cache)[0] / file
    content = path.read_bytes()
    path.unlink()
    if tear != "gone":
        path.write_bytes(content[: len(content) // 2] if tear == "cut" else b"")
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    forbidden()
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    assert len(entries(cache)) == 1


def test_tokens_move_to_disk_as_they_grow(source, cache, monkeypatch):
    monkeypatch.setattr(module, "SPOOL_BYTES", 8)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 4)
    tokenizer = BytesSpec().build()
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    assert len(entries(cache)) == 1


def test_faulty_data_leaves_nothing(tmp_path, cache, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "long enough to be moved"}\n{"text": }\n')
    source = FilesSource(paths=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="line 2: broken JSON"):
        open_store(source, BytesSpec().build())
    assert not list(cache.iterdir())
    monkeypatch.setattr(module, "SPOOL_BYTES", 8)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 4)
    with pytest.raises(DataError, match="line 2: broken JSON"):
        open_store(source, BytesSpec().build())
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_a_cache_tokens_stay_in_memory_with_one_warning(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "file"))
    tokenizer = BytesSpec().build()
    with caplog.at_level(logging.WARNING):
        assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
        assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    assert len(caplog.records) == 1 and "stay in memory" in caplog.text


@pytest.mark.parametrize("healthy_writes", [0, 1, 2, 3, 4, 5])
def test_full_disk_midway_loses_nothing(source, cache, monkeypatch, healthy_writes):
    write, calls = module._write, []

    def limited(path, action):
        calls.append(path)
        if len(calls) > healthy_writes:
            path.open("ab").write(b"partial")
            raise OSError(28, "No space left on device")
        write(path, action)

    monkeypatch.setattr(module, "SPOOL_BYTES", 8)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 4)
    monkeypatch.setattr(module, "_write", limited)
    tokenizer = BytesSpec().build()
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    assert len(calls) == healthy_writes + 1
    assert not entries(cache)


def test_two_processes_that_finish_together(source, cache, monkeypatch):
    tokenizer = BytesSpec().build()
    replace = module._replace

    def other_was_first(temporary, folder):
        monkeypatch.setattr(module, "_replace", replace)
        open_store(source, tokenizer)
        replace(temporary, folder)

    monkeypatch.setattr(module, "_replace", other_was_first)
    assert texts(open_store(source, tokenizer), tokenizer) == TEXTS
    assert len(entries(cache)) == 1
