"""The header of a GGUF file: metadata and where each tensor lies.

Format: the GGUF specification of ggml, versions 2 and 3, little-endian. The package `gguf` gives the tables of types
and their sizes. Its own reader maps the file and keeps an array per string, which costs seconds and a good part of a
small model's size for an ordinary vocabulary, so the header is read here.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from efficient_lm.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 1 << 26
"""Of everything before the tensors; vocabularies of 262,144 entries take 20 MB."""
_LENGTH_BYTES = 8
"""Of the length in front of a string."""
_DIMENSIONS = 4
_STRING, _ARRAY, _FLOAT32 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.FLOAT32
_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file.

    Attributes:
        shape: outermost axis first, ``[out, in]`` for a matrix (GGUF writes it the other way round).
        type: how its elements are stored.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one run of the innermost axis."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.elements // self.shape[-1] * self.row_bytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors begin.

    Attributes:
        path: of the file.
        metadata: by key; arrays are lists; a float32 by itself is the shortest decimal that rounds to it.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(path: str | Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: no such file, not GGUF, another version or byte order, truncated, damaged, one part of several.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _header(path, _Cursor(path, file))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


class _Cursor:
    """Reads little-endian values one after the other, and says so where the file ends early."""

    def __init__(self, path: Path, file: BufferedReader):
        self.path, self.size = path, path.stat().st_size
        self.most = min(self.size, HEADER_BYTES)
        self._file = file

    def tell(self) -> int:
        return self._file.tell()

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        return self._file.read(count)

    def check(self, count: int, what: str) -> None:
        """Whether so many bytes follow. The count comes from the file: it is compared before memory is reserved."""
        if count > self.size - self._file.tell():
            raise CheckpointError(f"{self.path}: truncated: the file ends within {what}")
        if count > self.most - self._file.tell():
            raise CheckpointError(f"{self.path}: damaged: {what} goes beyond the {self.most:,} bytes that headers have")

    def uint32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def uint64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.uint64(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: damaged: {what} is not UTF-8") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what)
        value = self._scalars(kind, 1, what)[0]
        return float(str(value)) if kind == _FLOAT32 else value.item()

    def _array(self, what: str) -> list[Any]:
        kind, count = self.uint32(what), self.uint64(what)
        if kind == _STRING:
            self.check(count * _LENGTH_BYTES, what)
        return (
            [self.string(what) for _ in range(count)] if kind == _STRING else self._scalars(kind, count, what).tolist()
        )

    def _scalars(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: damaged: {what} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _header(path: Path, cursor: _Cursor) -> Header:
    if cursor.size < len(MAGIC) or cursor.take(len(MAGIC), "its magic") != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
    version = cursor.uint32("its version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path}: big-endian GGUF is not supported; convert it to little-endian")
    if version not in VERSIONS:
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; {_alternatives(VERSIONS)} are")
    tensors, keys = cursor.uint64("its header"), cursor.uint64("its header")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string("its metadata")
        if key in metadata:
            raise CheckpointError(f"{path}: damaged: the key '{key}' comes twice")
        metadata[key] = cursor.value(cursor.uint32(f"'{key}'"), f"'{key}'")
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(f"{path}: holds one part of {parts} (split.count); merge the parts into one file first")
    found = [_tensor(cursor) for _ in range(tensors)]
    return Header(path, metadata, _placed(cursor, found, metadata))


def _tensor(cursor: _Cursor) -> TensorInfo:
    """An entry of the tensor table; its offset still counts from where the tensors begin."""
    name = cursor.string("its list of tensors")
    dimensions = cursor.uint32(f"tensor '{name}'")
    if not 1 <= dimensions <= _DIMENSIONS:
        raise CheckpointError(f"{cursor.path}: damaged: tensor '{name}' has {dimensions} dimensions")
    shape = tuple(cursor.uint64(f"tensor '{name}'") for _ in range(dimensions))[::-1]
    code, offset = cursor.uint32(f"tensor '{name}'"), cursor.uint64(f"tensor '{name}'")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise CheckpointError(f"{cursor.path}: tensor '{name}' is stored in the unknown type {code}") from error
    if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise CheckpointError(
            f"{cursor.path}: tensor '{name}' has shape {list(shape)}, which {kind.name} cannot hold: "
            f"its blocks are of {GGML_QUANT_SIZES[kind][0]} elements"
        )
    return TensorInfo(name, shape, kind, offset)


def _placed(cursor: _Cursor, found: list[TensorInfo], metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors with their offsets in the file, each checked to lie within it."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.path}: damaged: general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.tell() // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for tensor in found:
        if tensor.name in tensors:
            raise CheckpointError(f"{cursor.path}: damaged: tensor '{tensor.name}' comes twice")
        placed = TensorInfo(tensor.name, tensor.shape, tensor.type, start + tensor.offset)
        end = placed.offset + placed.bytes
        if end > cursor.size:
            raise CheckpointError(
                f"{cursor.path}: truncated: tensor '{tensor.name}' ends at byte {end:,}, the file at {cursor.size:,}"
            )
        tensors[tensor.name] = placed
    return tensors


def _alternatives(values: tuple[int, ...]) -> str:
    return " and ".join(map(str, values))
