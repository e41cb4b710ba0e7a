"""The tokenizer inside a GGUF file as `tokenizer.json` and `tokenizer_config.json`."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gguf.constants import TokenType

from efficient_lm.errors import CheckpointError, nearest
from efficient_lm.interop.gguf.header import Header
from efficient_lm.interop.gguf.pretokenizers import PRE_TOKENIZERS

SPACE = "▁"
TOKEN_CHARACTERS = 1024
"""Of one token at most: merges are looked for at each place where it can be cut."""
_NONE = ("none", "no_vocab")
_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
}  # fmt: skip
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""What the format means where a SentencePiece vocabulary does not say."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
        tokens: by id.
        types: by id.
        special: "bos_token", "eos_token", "unk_token", "pad_token" → id, those there are.
    """

    header: Header
    tokens: list[str]
    types: list[int]
    special: dict[str, int]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token → id."""
        return {token: index for index, token in enumerate(self.tokens)}

    def named(self) -> dict[str, str]:
        """The special tokens by their text."""
        return {name: self.tokens[index] for name, index in self.special.items()}

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in text as they stand, and those that text cannot hold."""
        shown = {TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED}
        framing = {self.special.get("bos_token"), self.special.get("eos_token")}
        return [
            {
                "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind != TokenType.USER_DEFINED,
            }
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in shown or index in framing
        ]  # fmt: skip


def tokenizer_files(header: Header) -> dict[str, bytes]:
    """File name → content; nothing where the file has no tokenizer.

    Raises:
        CheckpointError: a kind of tokenizer, or an option of it, that is not supported; a vocabulary that is damaged.
    """
    kind = _get(header, "model", "none")
    if kind in _NONE:
        return {}
    if kind not in _BUILDERS:
        raise CheckpointError(f"{header.path}: tokenizer '{kind}' is not supported; {nearest(kind, _BUILDERS)}")
    vocabulary = _vocabulary(header, kind)
    pieces, adds_bos = _BUILDERS[kind](vocabulary)
    adds = {
        "bos_token": bool(_get(header, "add_bos_token", adds_bos)),
        "eos_token": bool(_get(header, "add_eos_token", False)),
    }
    for name, wanted in adds.items():
        if wanted and name not in vocabulary.special:
            raise CheckpointError(f"{header.path}: the key 'tokenizer.ggml.{_SPECIAL[name]}' is missing")
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added(),
        **pieces, "post_processor": _frame(vocabulary, adds),
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.named(), "clean_up_tokenization_spaces": False,
        **{f"add_{name}": wanted for name, wanted in adds.items()},
    }  # fmt: skip
    if (template := header.metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(config, indent=2)}


def _get(header: Header, key: str, default: Any = None) -> Any:
    return header.metadata.get(f"tokenizer.ggml.{key}", default)


def _need(header: Header, key: str) -> Any:
    value = _get(header, key)
    if value is None:
        raise CheckpointError(f"{header.path}: the key 'tokenizer.ggml.{key}' is missing")
    return value


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def _vocabulary(header: Header, kind: str) -> Vocabulary:
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_need(header, "tokens"))]
    if max(map(len, tokens), default=0) > TOKEN_CHARACTERS:
        raise CheckpointError(f"{header.path}: tokenizer.ggml.tokens has a token of over {TOKEN_CHARACTERS} characters")
    types = _get(header, "token_type", [TokenType.NORMAL] * len(tokens))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) > embedding.shape[0]:
        raise CheckpointError(f"{header.path}: {len(tokens)} tokens for an embedding of {embedding.shape[0]} rows")
    _check_length(header, "token_type", types, tokens)
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise CheckpointError(f"{header.path}: the token {twice[0]!r} comes twice in tokenizer.ggml.tokens")
    special = {}
    for name, key in _SPECIAL.items():
        index = _get(header, key, _SENTENCEPIECE_IDS.get(name) if kind == "llama" else None)
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointError(f"{header.path}: tokenizer.ggml.{key} is {index}, and there are {len(tokens)} tokens")
        special[name] = index
    return Vocabulary(header, tokens, types, special)


def _check_length(header: Header, key: str, values: list[Any], tokens: list[str]) -> None:
    if len(values) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.{key} has {len(values)} entries for {len(tokens)} tokens")


def _frame(vocabulary: Vocabulary, adds: dict[str, bool]) -> dict[str, Any] | None:
    """The post-processor: what is put around a text."""
    if not any(adds.values()):
        return None
    names = {name: vocabulary.tokens[vocabulary.special[name]] for name, wanted in adds.items() if wanted}

    def framed(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": names[name], "type_id": type_id}}] if name in names else []
            for name in ("bos_token", "eos_token")
        )
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    return {
        "type": "TemplateProcessing", "single": framed("A", 0), "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in names.values()
        },
    }  # fmt: skip


def _byte_level(vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE (Radford et al. 2019): merges are listed, and a name says how text is cut into words."""
    header = vocabulary.header
    name = _need(header, "pre")
    if name not in PRE_TOKENIZERS:
        close = nearest(name, PRE_TOKENIZERS)
        raise CheckpointError(f"{header.path}: tokenizer.ggml.pre is '{name}', which is not supported; {close}")
    if _get(header, "add_space_prefix", False):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.add_space_prefix is not supported for tokenizer 'gpt2'")
    way = PRE_TOKENIZERS[name]
    pieces = {
        "normalizer": way.normalizer(), "pre_tokenizer": way.pre_tokenizer(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary.ids, _listed_merges(vocabulary), ignore_merges=way.whole_words),
    }  # fmt: skip
    return pieces, way.adds_bos


def _listed_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs from lines such as ``Ġt he``; a token may begin with a space but not hold one further on."""
    merges = []
    for line in _need(vocabulary.header, "merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or any(part not in vocabulary.ids for part in (left, right, left + right)):
            raise CheckpointError(f"{vocabulary.header.path}: the merge {line!r} joins what are not tokens")
        merges.append((left, right))
    return merges


def _sentencepiece(vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """SentencePiece BPE (Kudo and Richardson 2018): the pair whose union scores highest is merged first.

    Where a space is put first, it is put after each user-defined token of the text too, as llama.cpp does.
    """
    header = vocabulary.header
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if _get(header, key):
            raise CheckpointError(f"{header.path}: tokenizer.ggml.{key} is not supported")
    prefix = bool(_get(header, "add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = {"type": "Prepend", "prepend": SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unspaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [unspaced, {"type": "ByteFallback"}, {"type": "Fuse"}]
    pieces = {
        "normalizer": {"type": "Sequence", "normalizers": [first, spaces]} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
        "model": _bpe(
            vocabulary.ids, _scored_merges(vocabulary), fuse_unk=True,
            unk_token=vocabulary.tokens[vocabulary.special["unk_token"]],
            byte_fallback=TokenType.BYTE in vocabulary.types,
        ),
    }  # fmt: skip
    return pieces, True


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two ordinary tokens into a third, the highest score first."""
    scores = _need(vocabulary.header, "scores")
    _check_length(vocabulary.header, "scores", scores, vocabulary.tokens)
    ordinary = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (TokenType.NORMAL, 0)
    }
    merges = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in ordinary.items()
        for cut in range(1, len(token))
        if token[:cut] in ordinary and token[cut:] in ordinary
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {**plain, **options, "vocab": vocabulary, "merges": merges}


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""`tokenizer.ggml.model` → what builds it: parts of `tokenizer.json`, and whether a beginning token is put first."""
