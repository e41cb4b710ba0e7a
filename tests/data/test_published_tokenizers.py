"""What tokenizers say of beginnings, of special tokens and of the meaning of ids, and how they are published."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel

from efficient_lm.data.tokenizers import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    AbsentTokenizer,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SotuBPESpec,
    load_tokenizer,
)
from efficient_lm.errors import DataError


def write(folder, post_processor=None, config=None):
    """A byte-level tokenizer of the letters a to d, with <s> = 4 and </s> = 5."""
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate("abcd")}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        made.post_processor = processors.TemplateProcessing(single=post_processor, special_tokens=[("<s>", 4)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / TOKENIZER_FILE))
    if config is not None:
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    return HuggingFaceTokenizer.read(folder / TOKENIZER_FILE)


BEGINNINGS = [
    (None, None, 5, False),
    ("<s> $A", None, 4, True),
    (None, {"add_bos_token": True, "bos_token": "<s>"}, 4, True),
    (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 4, True),
    (None, {"add_bos_token": False, "bos_token": "<s>"}, 5, False),
]


@pytest.mark.parametrize(("post_processor", "config", "first", "adds"), BEGINNINGS)
def test_what_a_document_begins_with(tmp_path, post_processor, config, first, adds):
    tokenizer = write(tmp_path, post_processor, config)
    assert (tokenizer.begin_of_text, tokenizer.adds_begin, tokenizer.end_of_text) == (first, adds, 5)
    assert tokenizer.encode("ab").tolist() == [0, 1]


def test_special_tokens_are_recognised_only_where_asked(tmp_path):
    tokenizer = write(tmp_path)
    assert tokenizer.encode("a<s>b", special=True).tolist() == [0, 4, 1]
    assert 4 not in tokenizer.encode("a<s>b")
    assert tokenizer.encode("ab", special=True).tolist() == tokenizer.encode("ab").tolist()
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("\ud800", special=True)


def test_meanings(tmp_path):
    assert write(tmp_path).meanings() == [b"a", b"b", b"c", b"d", b"\0<s>", b"\0</s>"]
    assert ByteTokenizer().meanings()[97] == b"a"
    sotu = SotuBPESpec().build()
    assert sotu.meanings()[int(sotu.encode(" citizens")[0])] == b" citizens"


def test_sentencepiece_meanings(tmp_path):
    vocabulary = {"<0x0A>": 0, "▁the": 1, "x": 2, "</s>": 3}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / TOKENIZER_FILE))
    assert HuggingFaceTokenizer.read(tmp_path / TOKENIZER_FILE).meanings() == [b"\n", b" the", b"x", b"\0</s>"]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SotuBPESpec().build()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("begins", [True, False])
def test_published_files_say_whether_texts_begin_with_a_token(tmp_path, tokenizer, begins):
    for name, content in tokenizer.published_files(begins).items():
        (tmp_path / name).write_bytes(content)
    ids = Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE)).encode("To the Congress").ids
    plain = tokenizer.encode("To the Congress").tolist()
    assert ids == ([tokenizer.begin_of_text, *plain] if begins else plain)
    again = load_tokenizer(tmp_path)
    assert (again.adds_begin, again.begin_of_text) == (begins, tokenizer.begin_of_text)


def test_a_chosen_end_of_text_is_kept(tmp_path):
    write(tmp_path / "first", config={"eos_token": "</s>", "chat_template": "x"})
    chosen = HuggingFaceTokenizer.read(tmp_path / "first" / TOKENIZER_FILE, "<s>")
    chosen.save(tmp_path / "second")
    assert load_tokenizer(tmp_path / "second").end_of_text == 4
    assert json.loads((tmp_path / "second" / CONFIG_FILE).read_text())["chat_template"] == "x"


def test_an_absent_tokenizer_comes_back_absent(tmp_path):
    AbsentTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), AbsentTokenizer)
    for use in (lambda t: t.encode("a"), lambda t: t.decode([1])):
        with pytest.raises(DataError, match="came without a tokenizer"):
            use(load_tokenizer(tmp_path))


def test_a_damaged_companion_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("[1]")
    with pytest.raises(DataError, match="tokenizer_config.json' is not a JSON object"):
        HuggingFaceTokenizer.read(tmp_path / TOKENIZER_FILE)
