"""Where documents come from: the embedded corpus, or text, JSON Lines and Parquet files.

A source yields its documents one by one, in a fixed order, and leaves out empty ones. Every fault is a `DataError`
that names the file and the place in it.
"""

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BeforeValidator, Field

from efficient_lm.data.corpora import CORPORA
from efficient_lm.errors import DataError, nearest
from efficient_lm.spec import Choice, Listing


class SourceSpec(Choice, role="source"):
    """A sequence of documents."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents that are not empty, in order. Raises `DataError`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON-able value that changes when the documents may have changed. Raises `DataError` for missing files."""


class SotuSource(SourceSpec):
    """The embedded corpus: 233 State of the Union addresses, oldest first."""

    kind: Literal["sotu"] = "sotu"

    def documents(self) -> Iterator[str]:
        return read_documents(CORPORA / "sotu.jsonl.xz", "text")

    def identity(self) -> dict[str, Any]:
        with _readable(CORPORA / "sotu.jsonl.xz"):
            content = (CORPORA / "sotu.jsonl.xz").read_bytes()
        return {"kind": self.kind, "sha256": hashlib.sha256(content).hexdigest()}


def _tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class FilesSource(SourceSpec):
    """Files by path or glob, in the order given, each once; a glob's matches are sorted.

    `.txt` is one document per file; `.jsonl` and `.parquet` hold one per record, in the field `text_field`. Text and
    JSON Lines may be compressed: `.gz`, `.xz`, `.zst`. With `any_extension`, every other file is read as plain text.
    """

    kind: Literal["files"] = "files"
    paths: Annotated[Listing[str], BeforeValidator(_tuple), Field(min_length=1)]
    text_field: str = "text"
    any_extension: bool = False

    def files(self) -> list[Path]:
        """The files themselves. Raises `DataError` when one is missing, a folder, or of no known format."""
        found = [file for path in self.paths for file in _matches(path)]
        for file in found:
            _format(file, self.any_extension)
        return list(dict.fromkeys(found))

    def documents(self) -> Iterator[str]:
        for file in self.files():
            yield from read_documents(file, self.text_field, self.any_extension)

    def identity(self) -> dict[str, Any]:
        states = [(str(file.absolute()), file.stat()) for file in self.files()]
        files = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
        return {"kind": self.kind, "text_field": self.text_field, "files": files}


def read_documents(path: Path, text_field: str, any_extension: bool = False) -> Iterator[str]:
    """The documents of one file. Raises `DataError` for anything that is not as its extension says."""
    read, compression = _format(path, any_extension)
    empty = True
    for text in read(path, compression, text_field):
        if text:
            empty = False
            yield text
    if empty:
        raise DataError(f"'{path}' is empty: it holds no text")


def _read_text(path: Path, compression: str, text_field: str) -> Iterator[str]:
    with _readable(path), _open(path, compression) as file:
        content = file.read()
    yield _decode(content, path, 0).removeprefix("\ufeff")


def _read_json_lines(path: Path, compression: str, text_field: str) -> Iterator[str]:
    offset = 0
    with _readable(path), _open(path, compression) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset, f" (line {number})")
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.isspace():
                yield _field(text, text_field, f"'{path}' line {number}")


def _read_parquet(path: Path, compression: str, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow, path, text_field)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise DataError(f"'{path}' row {row}: field '{text_field}' is null, expected text")
                    yield text
                    row += 1
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8: field '{text_field}' near row {row}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read '{path}' as Parquet: {_line(error)}") from error


def _check_column(schema: Any, path: Path, text_field: str) -> None:
    import pyarrow.types

    if text_field not in schema.names:
        raise DataError(f"'{path}' has no field '{text_field}'; {nearest(text_field, schema.names)}")
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"'{path}': field '{text_field}' is {kind}, expected text")


READ_BYTES = 1 << 17
PLAUSIBLE_BYTES, PLAUSIBLE_RATIO = 1 << 26, 256
"""A compressed file may hold so much in any case, and beyond that so many times its own size."""
Reader = Callable[[Path, str, str], Iterator[str]]
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
FORMATS: dict[str, tuple[Reader, str]] = {
    **{f".txt{compression}": (_read_text, compression) for compression in COMPRESSIONS},
    **{f".jsonl{compression}": (_read_json_lines, compression) for compression in COMPRESSIONS},
    ".parquet": (_read_parquet, ""),
}


def _format(path: Path, any_extension: bool = False) -> tuple[Reader, str]:
    for extension, found in FORMATS.items():
        if path.name.lower().endswith(extension):
            return found
    if any_extension:
        return FORMATS[".txt"]
    extension = "".join(path.suffixes[-2:] if path.suffix in COMPRESSIONS else path.suffixes[-1:])
    raise DataError(f"'{path}' has the unknown extension '{extension}'; {nearest(extension, FORMATS)}")


def _matches(path: str) -> list[Path]:
    """The file of that name, or else what the glob matches."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        raise DataError(f"'{path}' is a folder: name files in it, such as '{path.rstrip(os.sep)}/*.txt'")
    if expanded.exists() and not expanded.is_file():
        raise DataError(f"'{path}' is not a regular file")
    if expanded.exists():
        return [expanded]
    if glob.has_magic(path):
        files = [Path(name) for name in sorted(glob.glob(str(expanded), recursive=True)) if os.path.isfile(name)]
        if not files:
            raise DataError(f"no file matches '{path}'")
        return files
    raise DataError(f"no file '{path}'{_neighbours(expanded)}")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder '{path.parent}'"
    names = [entry.name for entry in os.scandir(path.parent) if entry.name.lower().endswith(tuple(FORMATS))]
    return f"; {nearest(path.name, names)}" if names else ""


def _open(path: Path, compression: str) -> BinaryIO:
    if compression == "":
        return open(path, "rb")
    if compression == ".gz":
        opened: Any = gzip.open(path, "rb")
    elif compression == ".xz":
        opened = lzma.open(path, "rb")
    else:
        import pyarrow

        opened = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(_Bounded(opened, path), READ_BYTES)


class _Bounded(io.RawIOBase):
    """What a compressed file holds, up to where no text would be so much longer than its compressed form."""

    def __init__(self, opened: Any, path: Path):
        self._opened, self._path = opened, path
        self._left = max(PLAUSIBLE_BYTES, PLAUSIBLE_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._opened.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"'{self._path}' expands to over {PLAUSIBLE_RATIO} times its size, which no text does; it is not read"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._opened.close()
        super().close()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the faults of opening, reading and decompressing into `DataError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no file '{path}'") from error
    except PermissionError as error:
        raise DataError(f"no permission to read '{path}'") from error
    except EOFError as error:
        raise DataError(f"'{path}' is truncated: its compressed stream ends early") from error
    except (OSError, lzma.LZMAError, zlib.error) as error:
        if "truncated" in str(error).lower():
            raise DataError(f"'{path}' is truncated: its compressed stream ends early") from error
        raise DataError(f"cannot read '{path}': {_line(error)}") from error


def _decode(content: bytes, path: Path, offset: int, place: str = "") -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(f"'{path}' is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}{place}") from error


def _field(line: str, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON: {_line(error)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with the field '{text_field}', found {_name(record)}")
    if text_field not in record:
        raise DataError(f"{place}: no field '{text_field}'; {nearest(text_field, record)}")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field '{text_field}' is {_name(text)}, expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: field '{text_field}' holds a lone surrogate, not valid Unicode") from error
    return text


def _name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
