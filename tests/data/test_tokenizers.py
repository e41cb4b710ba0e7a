"""Tokenizers: exact round trips, byte lengths, streaming, saving, and faults that name the file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf

from efficient_lm.data import tokenizers as module
from efficient_lm.data.sources import SotuSource
from efficient_lm.data.tokenizers import TokenizerSpec, load_tokenizer
from efficient_lm.errors import DataError

ODD = [
    "",
    " ",
    "<|endoftext|>in plain<|endoftext|>",
    "\x00\x02\n\r\n \t  trailing  ",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u212b",
    "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 日本語 العربية हिन्दी",
    "\u202e\ufeff\u200b\U0010ffff\ufffd",
    "12345678901234567890 1,234.56 don't DON'T it’s",
]


def build(kind, **values):
    return TokenizerSpec.lookup(kind)(kind=kind, **values).build()


@pytest.fixture(params=["bytes", "sotu_bpe"])
def tokenizer(request):
    return build(request.param)


@pytest.fixture
def metaspace(tmp_path):
    """A tokenizer in the manner of SentencePiece with byte fallback: its tokens are not bytes."""
    vocabulary = {"</s>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for character in "▁helo":
        vocabulary[character] = len(vocabulary)
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = hf.normalizers.Replace(" ", "▁")
    parts = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence(parts)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_validation_text_comes_back_exactly(tokenizer):
    texts = list(SotuSource().documents())[19::20]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    stream = tokenizer.stream()
    shown = [stream.put(token) for token in ids] + [stream.end()]
    assert "".join(shown) == text


def test_sizes():
    assert (build("bytes").vocab_size, build("bytes").end_of_text) == (257, 256)
    bpe = build("sotu_bpe")
    assert bpe.vocab_size == 4096 and bpe.byte_lengths.shape == (4096,)
    assert np.flatnonzero(bpe.byte_lengths == 0).tolist() == [bpe.end_of_text]
    assert bpe.decode([bpe.end_of_text, *bpe.encode("Union"), 4096, 60000]) == "Union"


def test_stream_shows_a_character_only_when_it_is_whole(tokenizer):
    stream = tokenizer.stream()
    assert [stream.put(token) for token in tokenizer.encode("日")] == ["", "", "日"]
    half = tokenizer.encode("日")[:2]
    assert [stream.put(token) for token in half] == ["", ""]
    assert stream.end() == "\ufffd"


def test_long_texts_are_encoded_in_pieces_without_a_trace(monkeypatch):
    text = " ".join(list(SotuSource().documents())[:2]) + "\n" + "x" * 3000
    whole = build("sotu_bpe").encode(text)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(module, "GROUP_CHARACTERS", 1000)
    tokenizer = build("sotu_bpe")
    assert np.array_equal(tokenizer.encode(text), whole)
    several = tokenizer.encode_batch([text[:500], "", text])
    assert [len(ids) for ids in several] == [len(tokenizer.encode(text[:500])), 0, len(whole)]


def test_texts_stay_whole_where_words_do_not_begin_at_spaces(tmp_path):
    build("sotu_bpe").save(tmp_path)
    file = tmp_path / "tokenizer.json"
    assert build("file", path=str(file))._splits
    description = json.loads(file.read_text())
    description["pre_tokenizer"] = description["pre_tokenizer"]["pretokenizers"][1]
    file.write_text(json.dumps(description))
    assert not build("file", path=str(file))._splits
    description["normalizer"] = {"type": "NFC"}
    file.write_text(json.dumps(description))
    tokenizer = build("file", path=str(file))
    assert not tokenizer._splits and tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.end_of_text == tokenizer.end_of_text
    assert np.array_equal(again.encode("My fellow citizens"), tokenizer.encode("My fellow citizens"))


def test_file_or_folder_with_a_chosen_end_of_text(tmp_path):
    build("sotu_bpe").save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    by_folder, by_file = build("file", path=str(tmp_path)), build("file", path=str(tmp_path / "tokenizer.json"))
    assert by_folder.fingerprint == by_file.fingerprint
    assert len(by_folder.encode("the truncation of the file is not applied")) > 2
    chosen = build("file", path=str(tmp_path), end_of_text="!")
    assert chosen.end_of_text == whole["model"]["vocab"]["!"]
    assert chosen.fingerprint != by_folder.fingerprint
    with pytest.raises(DataError, match=r"no token '<\|endoftex\|>' for end_of_text; did you mean '<\|endoftext\|>'"):
        build("file", path=str(tmp_path), end_of_text="<|endoftex|>")


def test_tokenizer_whose_tokens_are_not_bytes(metaspace):
    tokenizer = build("file", path=str(metaspace))
    assert tokenizer.byte_lengths is None and tokenizer.end_of_text == 0
    text = "hello 日本 hell " * 6 + "é"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    shown = [stream.put(token) for token in ids]
    assert "".join(shown) + stream.end() == text
    assert not any("\ufffd" in piece for piece in shown)
    stream = tokenizer.stream()
    assert stream.put(ids[6]) == "" and stream.end() == "\ufffd"


def test_faults_name_the_file(tmp_path, metaspace):
    with pytest.raises(DataError, match="no tokenizer file '.*absent.json'"):
        build("file", path=str(tmp_path / "absent.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer file '.*empty/tokenizer\.json'"):
        build("file", path=str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no tokenizer file '.*empty/tokenizer\.json'"):
        load_tokenizer(tmp_path / "empty")
    for name, content in {"broken.json": b'{"version": ', "other.json": b'{"a": 1}', "bytes.json": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}' is not a valid tokenizer.json"):
            build("file", path=str(tmp_path / name))
    file = metaspace / "tokenizer.json"
    file.write_text(file.read_text().replace("</s>", "<stop>"))
    with pytest.raises(DataError, match=r"tokenizer\.json' has no well-known end-of-text token"):
        build("file", path=str(file))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert build("file", path=str(file)).end_of_text == 0


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_importing_the_room_does_not_import_jax():
    code = "import sys, efficient_lm.data.dataset, efficient_lm.data.tokenizers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
