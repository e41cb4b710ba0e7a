"""Encoded documents in flat arrays, made once per source and tokenizer and kept in a cache on disk.

The cache is `~/.cache/efficient_lm`, or the folder that the environment variable EFFICIENT_LM_CACHE names. An entry is
written beside its place and moved there whole. Where nothing can be written, the tokens stay in memory.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from efficient_lm.data.sources import SourceSpec
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError

FORMAT = 1
BATCH_CHARACTERS = 1 << 20
SPOOL_BYTES = 1 << 26
_log = logging.getLogger(__name__)


class TokenFile:
    """Tokens in a file, read as they are asked for.

    It stays readable when it is deleted meanwhile. One that becomes shorter is a fault in a batch, and not the end of
    the process, which it is where a file is mapped into memory.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = open(path, "rb")
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens of a slice of step 1. Raises `DataError`."""
        start, stop, _ = part.indices(self._length)
        size = max(stop - start, 0) * self.dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), size, start * self.dtype.itemsize)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read: {error.strerror}") from error
        if len(content) != size:
            raise DataError(
                f"'{self.path}' became shorter than its {self._length:,} tokens while it was read; delete its folder, "
                "and it is made again"
            )
        return np.frombuffer(content, self.dtype)


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens, one after the other.

    Attributes:
        tokens: uint16 or uint32 [tokens]; of slices alone where they lie in a file.
        offsets: int64 [documents + 1]; document d is ``tokens[offsets[d]:offsets[d + 1]]``, never empty.
        document_bytes: int64 [documents], the length of each document in UTF-8.
        end_of_text: the id between documents.
        begin_of_text: the id that a document begins with.
        byte_lengths: int32 [vocab_size], the bytes of each token, or None unless these add up to `document_bytes`.
    """

    tokens: "np.ndarray | TokenFile"
    offsets: np.ndarray
    document_bytes: np.ndarray
    end_of_text: int
    begin_of_text: int
    byte_lengths: np.ndarray | None

    def __len__(self) -> int:
        return len(self.document_bytes)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> TokenStore:
    """A store in memory. Documents of which the tokenizer leaves nothing are dropped."""
    spool = _Spool(None, _dtype(tokenizer))
    offsets, document_bytes, exact = _encode(texts, tokenizer, spool)
    return _store(spool.tokens(), offsets, document_bytes, exact, tokenizer)


def open_store(source: SourceSpec, tokenizer: Tokenizer) -> TokenStore:
    """The store of a source, from the cache when it is there. Raises `DataError`, having written nothing."""
    key = {"source": source.identity(), "tokenizer": tokenizer.fingerprint, "format": FORMAT}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = _cache_root() / "tokens" / name
    found = _load(folder, tokenizer)
    if found is not None:
        return found
    _log.info("encoding the %s source into %s", source.kind, folder)
    spool = _Spool(folder, _dtype(tokenizer))
    try:
        offsets, document_bytes, exact = _encode(source.documents(), tokenizer, spool)
        if not spool.publish(offsets, document_bytes, exact):
            return _store(spool.tokens(), offsets, document_bytes, exact, tokenizer)
    finally:
        spool.close()
    return _load(folder, tokenizer) or encode_texts(source.documents(), tokenizer)


class _Spool:
    """Tokens that arrive in parts: held in memory, moved to disk as they grow, at the end published in the cache."""

    def __init__(self, folder: Path | None, dtype: np.dtype):
        self._folder, self._dtype = folder, dtype
        self._parts: list[np.ndarray] = []
        self._held = self._written = 0
        self._temporary: Path | None = None

    def append(self, tokens: np.ndarray) -> None:
        self._parts.append(tokens.astype(self._dtype))
        self._held += len(tokens)
        if self._folder is not None and self._held * self._dtype.itemsize >= SPOOL_BYTES:
            try:
                self._flush()
            except OSError as error:
                self._give_up(error)

    def publish(self, offsets: np.ndarray, document_bytes: np.ndarray, exact: bool) -> bool:
        """Whether the entry is now in the cache; if not, `tokens` still has everything."""
        if self._folder is None:
            return False
        try:
            self._flush()
            _write(self._temporary / "offsets.npy", lambda file: np.save(file, offsets))
            _write(self._temporary / "document_bytes.npy", lambda file: np.save(file, document_bytes))
            entry = {"dtype": self._dtype.name, "tokens": self._written, "documents": len(document_bytes)}
            content = json.dumps(entry | {"exact": exact}).encode()
            _write(self._temporary / "entry.json", lambda file: file.write(content))
            _replace(self._temporary, self._folder)
        except OSError as error:
            self._give_up(error)
            return False
        return True

    def tokens(self) -> np.ndarray:
        """Everything appended, [tokens]."""
        return np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)

    def close(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _flush(self) -> None:
        if self._temporary is None:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self._folder.parent / f".writing-{secrets.token_hex(8)}"
            self._temporary.mkdir()
        _write(self._temporary / "tokens.bin", lambda file: [file.write(part) for part in self._parts])
        self._written += self._held
        self._parts, self._held = [], 0

    def _give_up(self, error: OSError) -> None:
        """Take back into memory what was moved to disk, and stay there."""
        _warn_once(str(self._folder.parent), error.strerror or str(error))
        if self._written:
            moved = np.fromfile(self._temporary / "tokens.bin", self._dtype, self._written)
            self._parts.insert(0, moved)
        self.close()
        self._folder, self._written = None, 0


def _encode(texts: Iterable[str], tokenizer: Tokenizer, spool: _Spool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Offsets, bytes of each document, and whether the tokens' own bytes add up to those."""
    offsets, document_bytes = array("q", [0]), array("q")
    exact = tokenizer.byte_lengths is not None
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if not len(ids):
                continue
            spool.append(ids)
            offsets.append(offsets[-1] + len(ids))
            document_bytes.append(len(text.encode()))
            exact = exact and int(tokenizer.byte_lengths[ids].sum()) == document_bytes[-1]
    return np.array(offsets, np.int64), np.array(document_bytes, np.int64), exact


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _store(
    tokens: np.ndarray, offsets: np.ndarray, document_bytes: np.ndarray, exact: bool, tokenizer: Tokenizer
) -> TokenStore:
    lengths = tokenizer.byte_lengths if exact else None
    return TokenStore(tokens, offsets, document_bytes, tokenizer.end_of_text, tokenizer.begin_of_text, lengths)


def _load(folder: Path, tokenizer: Tokenizer) -> TokenStore | None:
    """The cache entry; None when there is none or it is torn."""
    try:
        entry: dict[str, Any] = json.loads((folder / "entry.json").read_text())
        offsets, document_bytes = (
            np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("offsets", "document_bytes")
        )
        tokens = TokenFile(folder / "tokens.bin", np.dtype(entry["dtype"]))
        whole = len(tokens) == entry["tokens"] == offsets[-1] and len(document_bytes) == entry["documents"]
        whole = whole and len(offsets) == len(document_bytes) + 1
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None
    return _store(tokens, offsets, document_bytes, entry["exact"], tokenizer) if whole else None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Append to a file and wait until it is on disk."""
    with open(path, "ab") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Move a folder to its place; what lies there is torn, or the same entry by another process."""
    with suppress(OSError):
        temporary.rename(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _cache_root() -> Path:
    chosen = os.environ.get("EFFICIENT_LM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".cache" / "efficient_lm"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"efficient_lm-{os.getuid()}"


@cache
def _warn_once(folder: str, reason: str) -> None:
    _log.warning("cannot keep encoded documents in %s (%s): they stay in memory", folder, reason)
