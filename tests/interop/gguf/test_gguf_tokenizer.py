"""Tokenizers rebuilt from GGUF metadata: byte-level ones and those of SentencePiece."""

import json
import random

import pytest
import tokenizers

from efficient_lm.data.corpora import CORPORA
from efficient_lm.data.tokenizers import HuggingFaceTokenizer
from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf import open_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = [
    "", " ", "Hello, world", "  two  spaces\n\n\tand tabs\r\n", "def f(x):\n    return x**2 + 1e-5  # naïve",
    "año 日本語 текст 🙂 e\u0301", "12345 67.89", "don't WE'LL", "<|endoftext|>", "a" * 300,
]  # fmt: skip


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes."""
    from efficient_lm.data.tokenizers import _byte_alphabet

    return sorted(_byte_alphabet(), key=_byte_alphabet().__getitem__)


def rebuilt(draft, folder, keys):
    """The tokenizer and its config, of a model with these keys below `tokenizer.ggml`."""
    made = draft("llama")
    tokens = keys["tokens"]
    made.tensors |= {
        name: made.tensors[name].repeat(-(-len(tokens) // 40), 0) for name in ("token_embd.weight", "output.weight")
    }
    made.keys |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    files = open_gguf(made.write(folder / "model.gguf")).tokenizer
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()), json.loads(files["tokenizer_config.json"])


def byte_level(pre: str, words: list[str] = (), merges: list[str] = (), **more):
    tokens = ["<|endoftext|>", *alphabet(), *words]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges) or ["a b"]}
    if not merges:
        keys["tokens"].append("ab")
        keys["token_type"].append(NORMAL)
    return keys | {"bos_token_id": 0, "eos_token_id": 0} | more


def test_the_embedded_tokenizer_comes_back(draft, tmp_path):
    """Vocabulary, merges and special token of a real byte-level tokenizer; cut into words as `dbrx` says."""
    source = json.loads((CORPORA / "sotu_bpe.json").read_text())
    vocabulary = source["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in source["model"]["merges"]]
    special = source["added_tokens"][0]
    if special["id"] == len(tokens) or special["content"] not in vocabulary:
        tokens.insert(special["id"], special["content"])
    types = [CONTROL if token == special["content"] else NORMAL for token in tokens]
    keys = {"model": "gpt2", "pre": "dbrx", "tokens": tokens, "token_type": types, "merges": merges}
    ours, config = rebuilt(draft, tmp_path, keys | {"eos_token_id": special["id"]})
    theirs = tokenizers.Tokenizer.from_file(str(CORPORA / "sotu_bpe.json"))
    assert config["eos_token"] == special["content"] and not config["add_bos_token"]
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


CUTS = {
    "gpt-2": ["It", "'s", "Ġ12345", "ĠCamelCase", "Ġx", "+=", "1", "ĊĊĠĠ", "Ġy"],
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠCamelCase", "Ġx", "+=", "1", "ĊĊĠĠ", "Ġy"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "45", "ĠCamelCase", "Ġx", "+=", "1", "ĊĊ", "ĠĠ", "Ġy"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠCamelCase", "Ġx", "+=", "1", "ĊĊ", "ĠĠ", "Ġy"],
    "tekken": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠCamel", "Case", "Ġx", "+=", "1", "ĊĊ", "ĠĠ", "Ġy"],
    "default": ["It", "'", "s", "Ġ", "123", "45", "ĠCamelCase", "Ġx", "+=", "1", "ĊĊĠĠ", "Ġy"],
    "deepseek-coder": [
        "It",
        "'",
        "s",
        "Ġ",
        "1",
        "2",
        "3",
        "4",
        "5",
        "ĠCamelCase",
        "Ġx",
        "+=",
        "1",
        "Ċ",
        "Ċ",
        "ĠĠ",
        "Ġy",
    ],
}


@pytest.mark.parametrize("pre", CUTS)
def test_words_are_cut_as_the_name_says(draft, tmp_path, pre):
    tokenizer, _ = rebuilt(draft, tmp_path, byte_level(pre))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 CamelCase x+=1\n\n   y")]
    assert words == CUTS[pre]


def test_words_of_the_vocabulary_are_taken_whole_where_the_name_says_so(draft, tmp_path):
    """`cat` is a token that no merge makes."""
    whole, _ = rebuilt(draft, tmp_path, byte_level("llama-bpe", ["cat"], add_bos_token=False))
    merged, _ = rebuilt(draft, tmp_path, byte_level("dbrx", ["cat"]))
    assert whole.encode("cat").tokens == ["cat"] and merged.encode("cat").tokens == ["c", "a", "t"]


def test_text_is_composed_for_qwen2_only(draft, tmp_path):
    composed, _ = rebuilt(draft, tmp_path, byte_level("qwen2"))
    kept, _ = rebuilt(draft, tmp_path, byte_level("gpt-2"))
    assert composed.encode("e\u0301").ids == composed.encode("\u00e9").ids
    assert kept.encode("e\u0301").ids != kept.encode("\u00e9").ids


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_a_beginning_token_is_put_first_exactly_when_the_file_says_so(draft, tmp_path, pre, flag, adds):
    keys = byte_level(pre) | ({} if flag is None else {"add_bos_token": flag})
    tokenizer, config = rebuilt(draft, tmp_path, keys)
    plain = tokenizer.encode("ab c", add_special_tokens=False).ids
    assert tokenizer.encode("ab c").ids == [0] * adds + plain
    assert (
        tokenizer.encode("ab c", "c").ids
        == [0] * adds + plain + [0] * adds + tokenizer.encode("c", add_special_tokens=False).ids
    )
    assert config["add_bos_token"] == adds and config["bos_token"] == "<|endoftext|>"


def test_an_end_token_is_put_last(draft, tmp_path):
    tokenizer, config = rebuilt(draft, tmp_path, byte_level("gpt-2", add_eos_token=True))
    assert tokenizer.encode("ab").ids == [*tokenizer.encode("ab", add_special_tokens=False).ids, 0]
    assert config["add_eos_token"]


def test_added_tokens_and_the_chat_template(draft, tmp_path):
    keys = byte_level("gpt-2", ["<think>", "    ", "<|unused|>"])
    keys["token_type"][-4:-1] = [USER_DEFINED, USER_DEFINED, UNUSED]
    made = draft("llama")
    made.tensors |= {name: made.tensors[name].repeat(8, 0) for name in ("token_embd.weight", "output.weight")}
    made.keys |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    made.keys["tokenizer.chat_template"] = "{{ messages }}"
    files = open_gguf(made.write(tmp_path / "model.gguf")).tokenizer
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("a<think>b    c<|unused|>").tokens[:5] == ["a", "<think>", "b", "    ", "c"]
    assert "<|unused|>" not in tokenizer.encode("<|unused|>").tokens
    special = {token["content"]: token["special"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    assert special == {"<|endoftext|>": True, "<think>": False, "    ": False}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    read = HuggingFaceTokenizer.read(tmp_path / "tokenizer.json")
    assert read.end_of_text == 0 and read.decode(read.encode("a<think> \u00e9")) == "a<think> \u00e9"


PIECES = "▁ ▁t ▁th ▁the ▁a at cat ▁cat he ll ▁he ▁hell o lo 日 é ab bc abc ▁▁ ▁▁▁ . , ▁c".split(" ")


def sentencepiece(letters: str = "abcehlot▁.,日é", seed: int = 0, **more):
    """A vocabulary with bytes, a control, a user-defined and an unused token; scores in random order."""
    pieces = sorted(set(letters) | set(PIECES))
    order = list(range(len(pieces)))
    random.Random(seed).shuffle(order)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "[SEP]", "theat", *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, UNUSED, *[NORMAL] * len(pieces)]
    scores = [0.0] * (len(tokens) - len(pieces)) + [-1.0 - place for place in order]
    return {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types, "scores": scores} | more


def merge_greedily(keys, text: str) -> list[str]:
    """SentencePiece BPE in its plainest form: the best-scored union of two neighbours first, the leftmost of equals."""
    score = {
        token: value
        for token, kind, value in zip(keys["tokens"], keys["token_type"], keys["scores"], strict=True)
        if kind == NORMAL
    }
    symbols = list(text.replace(" ", "▁"))
    while True:
        unions = [
            (score[a + b], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in score
        ]
        if not unions:
            break
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        token
        for symbol in symbols
        for token in ([symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(draft, tmp_path, seed, prefix):
    keys = sentencepiece(seed=seed, add_space_prefix=prefix)
    tokenizer, _ = rebuilt(draft, tmp_path, keys)
    source = random.Random(seed)
    for _ in range(60):
        text = "".join(source.choices("abcehlot. 日éZ🙂\n ", k=source.randint(1, 40)))
        expected = merge_greedily(keys, " " + text if prefix else text)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert encoding.tokens == expected, text
        assert tokenizer.decode(encoding.ids) == text


def test_sentencepiece_adds_a_beginning_token_unless_told_otherwise(draft, tmp_path):
    tokenizer, config = rebuilt(draft, tmp_path, sentencepiece())
    assert tokenizer.encode("cat").tokens[0] == "<s>" and config["add_bos_token"]
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    tokenizer, config = rebuilt(draft, tmp_path, sentencepiece(add_bos_token=False))
    assert "<s>" not in tokenizer.encode("cat").tokens and not config["add_bos_token"]


def test_user_defined_tokens_are_found_and_unused_ones_are_not(draft, tmp_path):
    tokenizer, _ = rebuilt(draft, tmp_path, sentencepiece(add_space_prefix=False, add_bos_token=False))
    tokens = tokenizer.encode("theat[SEP]theat").tokens
    assert "[SEP]" in tokens and "theat" not in tokens


def test_characters_without_bytes_to_fall_back_on_are_one_unknown(draft, tmp_path):
    keys = sentencepiece(add_bos_token=False, add_space_prefix=False)
    keep = [index for index, kind in enumerate(keys["token_type"]) if kind != BYTE]
    keys |= {name: [keys[name][index] for index in keep] for name in ("tokens", "token_type", "scores")}
    tokenizer, _ = rebuilt(draft, tmp_path, keys)
    assert tokenizer.encode("aZQb").tokens == ["a", "<unk>", "b"]


def test_a_file_without_a_tokenizer(draft, tmp_path):
    assert open_gguf(draft().write(tmp_path / "model.gguf")).tokenizer == {}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"pre": "llama-bp"}, "did you mean 'llama-bpe'"),
        ({"pre": None}, "'tokenizer.ggml.pre' is missing"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"merges": ["a zz"]}, "the merge 'a zz'"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"eos_token_id": 9999}, "tokenizer.ggml.eos_token_id is 9999"),
        ({"add_bos_token": True, "bos_token_id": None}, "'tokenizer.ggml.bos_token_id' is missing"),
        ({"add_space_prefix": True}, "add_space_prefix is not supported"),
    ],
)
def test_faults_of_byte_level_tokenizers(draft, tmp_path, change, part):
    assert_refused(draft, tmp_path, byte_level("gpt-2") | change, part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"scores": [0.0]}, "scores has 1 entries"),
        ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not supported"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is not supported"),
    ],
)
def test_faults_of_sentencepiece_tokenizers(draft, tmp_path, change, part):
    assert_refused(draft, tmp_path, sentencepiece() | change, part)


def test_a_token_that_comes_twice(draft, tmp_path):
    keys = byte_level("gpt-2")
    keys["tokens"][5] = keys["tokens"][6]
    assert_refused(draft, tmp_path, keys, "comes twice")


def test_more_tokens_than_the_embedding_has_rows(draft, tmp_path):
    made = draft("llama")
    made.keys |= {f"tokenizer.ggml.{key}": value for key, value in byte_level("gpt-2").items()}
    with pytest.raises(CheckpointError, match="258 tokens for an embedding of 40 rows"):
        assert open_gguf(made.write(tmp_path / "model.gguf")).tokenizer


def assert_refused(draft, folder, keys, part):
    keys = {key: value for key, value in keys.items() if value is not None}
    made = draft("llama")
    made.tensors |= {name: made.tensors[name].repeat(10, 0) for name in ("token_embd.weight", "output.weight")}
    made.keys |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    file = open_gguf(made.write(folder / "model.gguf"))
    with pytest.raises(CheckpointError) as caught:
        assert file.tokenizer
    assert part in str(caught.value) and "\n" not in str(caught.value)
