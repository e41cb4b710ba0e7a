"""Tokenizers: bytes, the embedded byte-level BPE, any Hugging Face `tokenizer.json`, and none at all.

A tokenizer adds no special tokens to a text, and recognises them only where it is asked to: a document that spells one
out is encoded as plain characters. Nothing here imports jax.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efficient_lm.data.corpora import CORPORA
from efficient_lm.data.token_streams import ByteStream, WindowStream
from efficient_lm.errors import DataError, nearest
from efficient_lm.spec import Choice
from efficient_lm.untrusted import TOKENIZER_BYTES, inside, parse_json, read_bytes

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
BYTES_FILE = "byte_tokenizer.json"
NONE_FILE = "no_tokenizer.json"
COMPANIONS = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside a `tokenizer.json` that other programs read; they travel along."""

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")
MOST_TOKENS = 1 << 22
"""Ids of a vocabulary at most; a single one in a `tokenizer.json` could claim billions."""
PIECE_CHARACTERS = 1 << 12
GROUP_CHARACTERS = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        end_of_text: the id between documents.
        begin_of_text: the id that a document begins with: the one that a published tokenizer puts first, or
            `end_of_text`.
        adds_begin: whether the tokenizer itself puts `begin_of_text` before a text.
        byte_lengths: int32 [vocab_size], UTF-8 bytes of each token, 0 for special ones; None when tokens are not bytes.
        fingerprint: hash of everything that decides the ids.
    """

    vocab_size: int
    end_of_text: int
    begin_of_text: int
    adds_begin: bool = False
    byte_lengths: np.ndarray | None
    fingerprint: str

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids, int32 [tokens]. Raises `DataError` for text that UTF-8 cannot hold (lone surrogates).

        Args:
            special: whether the name of a special token in the text (as chat formats write it) stands for that token.
        """
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the tokenizer can."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def meanings(self) -> list[bytes | None]:
        """What each id stands for: the bytes of a token, or the name of a special one after a zero byte; None for
        nothing. Two vocabularies are matched by it."""

    def stream(self) -> ByteStream | WindowStream:
        """An incremental `decode`: `put(id)` and finally `end()` return printable pieces of the text."""
        return WindowStream(self.decode)

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name and content of what `load_tokenizer` needs."""

    @abstractmethod
    def published_files(self, begins: bool) -> dict[str, bytes]:
        """Name and content of the same in Hugging Face format.

        Args:
            begins: whether whoever reads them is to put `begin_of_text` before a text, as training here does.
        """

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer` needs."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (Path(folder) / name).write_bytes(content)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for end of text."""

    vocab_size = 257
    end_of_text = begin_of_text = 256
    fingerprint = "bytes"

    def __init__(self) -> None:
        self.byte_lengths = np.ones(self.vocab_size, np.int32)
        self.byte_lengths[self.end_of_text] = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def meanings(self) -> list[bytes | None]:
        return [*(bytes([byte]) for byte in range(256)), b"\0" + END_OF_TEXT_NAMES[0].encode()]

    def stream(self) -> ByteStream:
        return ByteStream(self._bytes)

    def files(self) -> dict[str, bytes]:
        return {BYTES_FILE: b'{"kind": "bytes"}\n'}

    def published_files(self, begins: bool) -> dict[str, bytes]:
        """A byte-level BPE without merges, whose ids are these."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for character, byte in _byte_alphabet().items()}
        made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([END_OF_TEXT_NAMES[0]])
        content = made.to_str().encode()
        return HuggingFaceTokenizer({TOKENIZER_FILE: content}, Path(TOKENIZER_FILE)).published_files(begins)

    @staticmethod
    def _bytes(token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` as the Hugging Face `tokenizers` library reads it.

    Args:
        files: name and content of `tokenizer.json` and of what lies beside it.
        path: of `tokenizer.json`, for messages.
        end_of_text: name of the token; None takes what `tokenizer_config.json` says, or a well-known one.

    Raises:
        DataError: it is no tokenizer, or its end-of-text token is unknown.
    """

    def __init__(self, files: Mapping[str, bytes], path: Path, end_of_text: str | None = None):
        import tokenizers

        self._source = files[TOKENIZER_FILE]
        self._companions = {name: content for name, content in files.items() if name != TOKENIZER_FILE}
        try:
            description = parse_json(self._source)
            self._tokenizer = tokenizers.Tokenizer.from_str(self._source.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"'{path}' is not a valid tokenizer.json: {_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise DataError(f"'{path}': a vocabulary of {self.vocab_size:,} ids; 1 to {MOST_TOKENS:,} are read")
        config = _json(self._companions.get(CONFIG_FILE, b"{}"), path.parent / CONFIG_FILE)
        self.end_of_text_name = end_of_text or _guess_end_of_text(path, config, vocabulary)
        if self.end_of_text_name not in vocabulary:
            added = [token["content"] for token in description.get("added_tokens", [])]
            close = nearest(self.end_of_text_name, added or vocabulary)
            raise DataError(f"'{path}' has no token '{self.end_of_text_name}' for end_of_text; {close}")
        self.end_of_text = vocabulary[self.end_of_text_name]
        self.begin_of_text = self._first_token(config, vocabulary)
        self.fingerprint = hashlib.sha256(self._source + self.end_of_text_name.encode()).hexdigest()[:20]
        self._token_bytes = _token_bytes(description, vocabulary, self.vocab_size)
        self._splits = self._token_bytes is not None and _begins_words_at_spaces(self._tokenizer)
        self.byte_lengths = None
        if self._token_bytes is not None:
            self._token_bytes[self.end_of_text] = b""
            self.byte_lengths = np.fromiter(map(len, self._token_bytes), np.int32, self.vocab_size)

    @classmethod
    def read(cls, path: Path, end_of_text: str | None = None) -> "HuggingFaceTokenizer":
        """The tokenizer of a file, with what lies beside it. Raises `DataError`."""
        beside = {name: _beside(path.parent, name) for name in COMPANIONS if (path.parent / name).is_file()}
        return cls({TOKENIZER_FILE: _read(path), **beside}, path, end_of_text)

    @classmethod
    def read_folder(cls, folder: Path, end_of_text: str | None = None) -> "HuggingFaceTokenizer":
        """The tokenizer of a folder; a `tokenizer.json` that is a link out of it is refused. Raises `DataError`."""
        return cls.read(inside(folder, TOKENIZER_FILE, DataError), end_of_text)

    def _first_token(self, config: dict[str, Any], vocabulary: dict[str, int]) -> int:
        """What the tokenizer puts before every text, or else `end_of_text`."""
        with_special = self._tokenizer.encode("a", add_special_tokens=True).ids
        without = self._tokenizer.encode("a", add_special_tokens=False).ids
        begin = _token_name(config.get("bos_token"))
        self.adds_begin = True
        if with_special and with_special[0] != without[0]:
            return with_special[0]
        if config.get("add_bos_token") and begin in vocabulary:
            return vocabulary[begin]
        self.adds_begin = False
        return self.end_of_text

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if not special:
            return super().encode(text)
        utf8(text)
        self._tokenizer.encode_special_tokens = False
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for owners, pieces in _groups(texts, self._splits):
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            for owner, encoding in zip(owners, encodings, strict=True):
                parts[owner].append(np.array(encoding.ids, np.int32))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        if self._token_bytes is not None:
            return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")
        return self._tokenizer.decode([int(i) for i in ids if i != self.end_of_text], skip_special_tokens=True)

    def meanings(self) -> list[bytes | None]:
        description = json.loads(self._source)
        special = {token["id"]: token["content"] for token in description.get("added_tokens", []) if token["special"]}
        found: list[bytes | None] = [None] * self.vocab_size
        for name, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            found[index] = self._token_bytes[index] if self._token_bytes is not None else _piece_bytes(name)
        for index, name in special.items():
            found[index] = b"\0" + name.encode()
        return found

    def stream(self) -> ByteStream | WindowStream:
        return WindowStream(self.decode) if self._token_bytes is None else ByteStream(self._bytes)

    def files(self) -> dict[str, bytes]:
        stated = self._companions.get(CONFIG_FILE, b"{}")
        same = _token_name(json.loads(stated).get("eos_token")) == self.end_of_text_name
        config = stated if same else _config(self.end_of_text_name, json.loads(stated))
        return {TOKENIZER_FILE: self._source, **self._companions, CONFIG_FILE: config}

    def published_files(self, begins: bool) -> dict[str, bytes]:
        import tokenizers
        from tokenizers import processors

        files = self.files()
        if self.adds_begin or not begins:
            return files
        name = self.end_of_text_name
        made = tokenizers.Tokenizer.from_str(self._source.decode())
        first = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, self.end_of_text)]
        )
        made.post_processor = processors.Sequence([made.post_processor, first]) if made.post_processor else first
        stated = {**json.loads(files[CONFIG_FILE]), "bos_token": name, "add_bos_token": True}
        return {**files, TOKENIZER_FILE: made.to_str().encode(), CONFIG_FILE: _config(name, stated)}

    def _bytes(self, token: int) -> bytes:
        # A model's vocabulary may be rounded up past the tokenizer's.
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""


class AbsentTokenizer(Tokenizer):
    """The tokenizer of a model that came without one: ids are all it takes."""

    vocab_size, end_of_text, begin_of_text = 1, 0, 0
    byte_lengths = None
    fingerprint = "none"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise self._fault()

    def decode(self, ids: Iterable[int]) -> str:
        raise self._fault()

    def meanings(self) -> list[bytes | None]:
        return [None]

    def files(self) -> dict[str, bytes]:
        return {NONE_FILE: b'{"kind": "none"}\n'}

    def published_files(self, begins: bool) -> dict[str, bytes]:
        return {}

    @staticmethod
    def _fault() -> DataError:
        return DataError(
            "this model came without a tokenizer and takes token ids, not text: what was trained on a synthetic task "
            f"is measured by `efficient-lm evaluate`; a published model wants a {TOKENIZER_FILE} in its folder"
        )


class TokenizerSpec(Choice, role="tokenizer"):
    """How text becomes tokens."""

    @abstractmethod
    def build(self) -> Tokenizer:
        """The tokenizer. Raises `DataError` for a missing or malformed file."""


class BytesSpec(TokenizerSpec):
    """One token per UTF-8 byte; 257 entries."""

    kind: Literal["bytes"] = "bytes"

    def build(self) -> Tokenizer:
        return ByteTokenizer()


class SotuBPESpec(TokenizerSpec):
    """The embedded byte-level BPE with 4,096 entries, trained on the training part of the embedded corpus."""

    kind: Literal["sotu_bpe"] = "sotu_bpe"

    def build(self) -> Tokenizer:
        files = {TOKENIZER_FILE: _read(CORPORA / "sotu_bpe.json")}
        return HuggingFaceTokenizer(files, CORPORA / "sotu_bpe.json", "<|endoftext|>")


class FileSpec(TokenizerSpec):
    """A Hugging Face `tokenizer.json`, or a folder that holds one."""

    kind: Literal["file"] = "file"
    path: str
    end_of_text: str | None = None

    def build(self) -> Tokenizer:
        path = Path(self.path).expanduser()
        read = HuggingFaceTokenizer.read_folder if path.is_dir() else HuggingFaceTokenizer.read
        return read(path, self.end_of_text)


class AbsentSpec(TokenizerSpec):
    """No tokenizer: the model takes token ids."""

    kind: Literal["none"] = "none"

    def build(self) -> Tokenizer:
        return AbsentTokenizer()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote. Raises `DataError` when there is none."""
    for name, kind in ((BYTES_FILE, ByteTokenizer), (NONE_FILE, AbsentTokenizer)):
        if (Path(folder) / name).is_file():
            return kind()
    return HuggingFaceTokenizer.read_folder(Path(folder))


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises `DataError` for a lone surrogate, which is not Unicode text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate at character {error.start}, which is not valid Unicode"
        ) from error


def _groups(texts: Sequence[str], splits: bool) -> Iterator[tuple[list[int], list[str]]]:
    """Pieces of the texts, in order, with the index of the text each belongs to; a group bounds the memory in use."""
    owners: list[int] = []
    pieces: list[str] = []
    size = 0
    for owner, text in enumerate(texts):
        utf8(text)
        for piece in _pieces(text) if splits else [text]:
            owners.append(owner)
            pieces.append(piece)
            size += len(piece)
            if size >= GROUP_CHARACTERS:
                yield owners, pieces
                owners, pieces, size = [], [], 0
    if pieces:
        yield owners, pieces


def _begins_words_at_spaces(tokenizer: Any) -> bool:
    """Whether a text cut before the space between two words gives the same tokens as the whole."""
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return False
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab cd ef")]
    return len(words) == 3 and all(word.startswith("Ġ") for word in words[1:])


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before spaces between two words: short pieces encode faster, in parallel, in little memory."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _BETWEEN_WORDS.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _token_bytes(description: dict[str, Any], vocabulary: dict[str, int], size: int) -> list[bytes] | None:
    """The bytes of every id of a byte-level tokenizer (b"" for special tokens), None for other tokenizers."""
    if (description.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    added = {token["content"]: token["special"] for token in description.get("added_tokens", [])}
    to_byte = _byte_alphabet()
    table = [b""] * size
    for token, index in vocabulary.items():
        if token in added:
            table[index] = b"" if added[token] else token.encode()
        elif all(character in to_byte for character in token):
            table[index] = bytes(to_byte[character] for character in token)
        else:
            return None
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level vocabularies (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece token: ``▁`` is a space, ``<0x0A>`` a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte.group(1), 16)]) if byte else piece.replace("▁", " ").encode()


def _guess_end_of_text(path: Path, config: dict[str, Any], vocabulary: dict[str, int]) -> str:
    name = _token_name(config.get("eos_token"))
    if name in vocabulary:
        return name
    found = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
    if not found:
        raise DataError(
            f"'{path}' has no well-known end-of-text token ({', '.join(END_OF_TEXT_NAMES[:4])}, ...): "
            "name one of its tokens with end_of_text"
        )
    return found[0]


def _beside(folder: Path, name: str) -> bytes:
    return _read(inside(folder, name, DataError))


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, TOKENIZER_BYTES, DataError)
    except FileNotFoundError as error:
        raise DataError(f"no tokenizer file '{path}'") from error
    except OSError as error:
        raise DataError(f"cannot read tokenizer file '{path}': {error.strerror}") from error


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"'{path}' is not valid JSON: {_line(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"'{path}' is not a JSON object")
    return value


def _token_name(token: Any) -> str | None:
    """A token as a config states it, by its name or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _config(end_of_text: str, others: Mapping[str, Any] | None = None) -> bytes:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **(others or {}), "eos_token": end_of_text}
    return json.dumps(config, indent=2).encode() + b"\n"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
