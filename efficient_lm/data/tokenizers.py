"""Tokenizers: bytes, the embedded byte-level BPE, and any Hugging Face `tokenizer.json`.

A tokenizer neither adds nor recognises special tokens in text: a document that spells one out is encoded as plain
characters. Nothing here imports jax.
"""

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efficient_lm.data.corpora import CORPORA
from efficient_lm.errors import DataError, nearest
from efficient_lm.spec import Choice

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
BYTES_FILE = "byte_tokenizer.json"
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")
PIECE_CHARACTERS = 1 << 12
GROUP_CHARACTERS = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class ByteStream:
    """Text as its bytes arrive; a character appears when its last byte has."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        """The characters completed by `token`, possibly none."""
        return self._decoder.decode(self._bytes(int(token)))

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The same for tokenizers whose tokens have no bytes of their own: decode a short window and show what is new."""

    _longest_character = 4
    _window = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = self._held = 0

    def put(self, token: int) -> str:
        """The characters completed by `token`, possibly none."""
        self._tokens.append(int(token))
        text = self._decode(self._tokens)
        if text.endswith("\ufffd") and self._held + 1 < self._longest_character:
            self._held += 1
            return ""
        return self._show(text)

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._show(self._decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        if len(self._tokens) > 2 * self._window:
            self._tokens = self._tokens[-self._window :]
            text = self._decode(self._tokens)
        self._shown, self._held = len(text), 0
        return new


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        end_of_text: the id between documents.
        byte_lengths: int32 [vocab_size], UTF-8 bytes of each token, 0 for special ones; None when tokens are not bytes.
        fingerprint: hash of everything that decides the ids.
    """

    vocab_size: int
    end_of_text: int
    byte_lengths: np.ndarray | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [tokens]. Raises `DataError` for text that UTF-8 cannot hold (lone surrogates)."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the tokenizer can."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> ByteStream | WindowStream:
        """An incremental `decode`: `put(id)` and finally `end()` return printable pieces of the text."""
        return WindowStream(self.decode)

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer` needs."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for end of text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes"

    def __init__(self) -> None:
        self.byte_lengths = np.ones(self.vocab_size, np.int32)
        self.byte_lengths[self.end_of_text] = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> ByteStream:
        return ByteStream(self._bytes)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder), {BYTES_FILE: b'{"kind": "bytes"}\n'})

    @staticmethod
    def _bytes(token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` as the Hugging Face `tokenizers` library reads it."""

    def __init__(self, path: Path, end_of_text: str | None = None):
        """Read `path`. Raises `DataError` when it is no tokenizer, or its end-of-text token is unknown."""
        import tokenizers

        self._source = _read(path)
        try:
            description = json.loads(self._source)
            self._tokenizer = tokenizers.Tokenizer.from_str(self._source.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"'{path}' is not a valid tokenizer.json: {_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text_name = end_of_text or _guess_end_of_text(path, vocabulary)
        if self.end_of_text_name not in vocabulary:
            added = [token["content"] for token in description.get("added_tokens", [])]
            close = nearest(self.end_of_text_name, added or vocabulary)
            raise DataError(f"'{path}' has no token '{self.end_of_text_name}' for end_of_text; {close}")
        self.end_of_text = vocabulary[self.end_of_text_name]
        self.fingerprint = hashlib.sha256(self._source + self.end_of_text_name.encode()).hexdigest()[:20]
        self._token_bytes = _token_bytes(description, vocabulary, self.vocab_size)
        self._splits = self._token_bytes is not None and _begins_words_at_spaces(self._tokenizer)
        self.byte_lengths = None
        if self._token_bytes is not None:
            self._token_bytes[self.end_of_text] = b""
            self.byte_lengths = np.fromiter(map(len, self._token_bytes), np.int32, self.vocab_size)

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

    def stream(self) -> ByteStream | WindowStream:
        return WindowStream(self.decode) if self._token_bytes is None else ByteStream(self._bytes)

    def save(self, folder: str | Path) -> None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_of_text_name}
        _write(Path(folder), {TOKENIZER_FILE: self._source, CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n"})

    def _bytes(self, token: int) -> bytes:
        # A model's vocabulary may be rounded up past the tokenizer's.
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""


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
        return HuggingFaceTokenizer(CORPORA / "sotu_bpe.json", "<|endoftext|>")


class FileSpec(TokenizerSpec):
    """A Hugging Face `tokenizer.json`, or a folder that holds one."""

    kind: Literal["file"] = "file"
    path: str
    end_of_text: str | None = None

    def build(self) -> Tokenizer:
        path = Path(self.path).expanduser()
        return HuggingFaceTokenizer(path / TOKENIZER_FILE if path.is_dir() else path, self.end_of_text)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote. Raises `DataError` when there is none."""
    if (Path(folder) / BYTES_FILE).is_file():
        return ByteTokenizer()
    return HuggingFaceTokenizer(Path(folder) / TOKENIZER_FILE)


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


def _guess_end_of_text(path: Path, vocabulary: dict[str, int]) -> str:
    config = path.parent / CONFIG_FILE
    if config.is_file():
        try:
            token = json.loads(_read(config)).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"'{config}' is not a JSON object: {_line(error)}") from error
        name = token.get("content") if isinstance(token, dict) else token
        if name in vocabulary:
            return name
    found = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
    if not found:
        raise DataError(
            f"'{path}' has no well-known end-of-text token ({', '.join(END_OF_TEXT_NAMES[:4])}, ...): "
            "name one of its tokens with end_of_text"
        )
    return found[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no tokenizer file '{path}'") from error
    except OSError as error:
        raise DataError(f"cannot read tokenizer file '{path}': {error.strerror}") from error


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
