"""Tensors on disk, read a piece at a time: safetensors in one file or in shards with an index."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from efficient_lm.errors import CheckpointError
from efficient_lm.untrusted import JSON_BYTES, inside, parse_json, read_bytes, refuse_pickle

log = logging.getLogger(__name__)

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Element types that parameters are published in."""

_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 1 << 25
"""Of a file's list of tensors; those of the largest published models have less than one million."""
SHARD_BYTES = 2 * 10**9


class TensorSource(Protocol):
    """Named tensors that are read when asked for.

    Attributes:
        shapes: of each tensor, by name.
        dtypes: of each tensor, a name of `DTYPES`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a tensor."""


class SafetensorsFolder:
    """The tensors of a folder in Hugging Face format.

    What is read is copied from its place in the file, so that no pages of it stay in memory beside the parameters.

    Raises:
        CheckpointError: no weights, pickled ones, a missing, torn or truncated file, an element type that is not read.
    """

    def __init__(self, folder: Path):
        self._places: dict[str, tuple[Path, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        listed = _listed(folder)
        for file in dict.fromkeys(listed.values()) if listed else [_single(folder)]:
            for name, shape, dtype, offset in _header(file):
                if listed is None or listed.get(name) == file:
                    self._places[name], self.shapes[name], self.dtypes[name] = (file, offset), shape, dtype
        for name, file in (listed or {}).items():
            if name not in self.shapes:
                raise CheckpointError(f"{file}: does not hold '{name}', which {_INDEX} says it does")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, in its own dtype."""
        (file, offset), shape, dtype = self._places[name], self.shapes[name], DTYPES[self.dtypes[name]]
        row = math.prod(shape[1:]) * dtype.itemsize
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape = (max(stop - start, 0), *shape[1:])
        try:
            content = np.fromfile(file, np.uint8, math.prod(shape) * dtype.itemsize, offset=offset + start * row)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
        return content.view(dtype).reshape(shape)


def _listed(folder: Path) -> dict[str, Path] | None:
    """Tensor name → file, from the index; None where there is none."""
    index = folder / _INDEX
    if not index.is_file():
        return None
    try:
        names = parse_json(read_bytes(inside(folder, _INDEX), JSON_BYTES))["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors ({_line(error)})") from error
    places = {file: inside(folder, file, said_by=_INDEX) for file in dict.fromkeys(files.values())}
    listed = {name: places[file] for name, file in files.items()}
    for file in places.values():
        refuse_pickle(file)
        if not file.is_file():
            raise CheckpointError(f"{file}: this shard is missing; {_INDEX} lists it")
    return listed


def _single(folder: Path) -> Path:
    file = folder / _WEIGHTS
    if file.is_file():
        return inside(folder, _WEIGHTS)
    for other in sorted(folder.iterdir()):
        refuse_pickle(other)
    raise CheckpointError(f"{folder}: no weights: neither {_WEIGHTS} nor {_INDEX}")


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape and dtype of every tensor of a file, and the byte where it begins."""
    offsets = _offsets(file)
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            piece = opened.get_slice(name)
            code = piece.get_dtype()
            if code not in _CODES:
                raise CheckpointError(f"{file}: '{name}' has elements of type {code}; {', '.join(_CODES)} are read")
            yield name, tuple(piece.get_shape()), _CODES[code], offsets[name]


def _offsets(file: Path) -> dict[str, int]:
    """The byte where each tensor begins: behind the header, which is JSON behind its own length."""
    refuse_pickle(file)
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(HEADER_BYTES, file.stat().st_size):
                raise CheckpointError(f"{file}: truncated or not safetensors (a header of {length:,} bytes)")
            entries = parse_json(opened.read(length))
        entries.pop("__metadata__", None)
        return {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors ({_line(error)})") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "numpy")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors ({_line(error)})") from error


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, one file's worth in memory at a time: `model.safetensors`, or shards and their index."""
    shards: list[list[str]] = []
    total, size, held = 0, 0, {}
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), held))
            size, held = 0, {}
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), held))
    if len(shards) == 1:
        _part(folder, 0).rename(folder / _WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _part(folder, number).rename(file)
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    save_file(tensors, _part(folder, number), metadata={"format": "pt"})
    # The library lets the owner alone read what it writes; the folder says who may.
    _part(folder, number).chmod(folder.stat().st_mode & 0o666)
    return list(tensors)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
