"""Tensors of a GGUF file under their Hugging Face names: read in pieces, dequantised, rows put back in order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf.header import Header, TensorInfo

CHUNK_ELEMENTS = 1 << 20
"""Dequantised at a time: the decoder's working memory is several times this many float32."""

PLAIN = {
    GGMLQuantizationType.F32: ("float32", np.dtype("<f4")),
    GGMLQuantizationType.F16: ("float16", np.dtype("<f2")),
    GGMLQuantizationType.BF16: ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
}
"""Types read as they are; every other one becomes float32."""

_DECODED = (
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS IQ1_M "
    "TQ1_0 TQ2_0 MXFP4 NVFP4"
)
READABLE = frozenset(kind for kind in GGMLQuantizationType if kind in PLAIN or kind.name in _DECODED.split())
"""Types that are read: plain ones, and those that the package decodes."""


@dataclass(frozen=True)
class Stored:
    """How a Hugging Face tensor is kept in a GGUF file.

    Attributes:
        name: in the file.
        shape: ``[out, in]`` as in Hugging Face.
        interleaved_heads: heads whose rows GGUF keeps in the order of interleaved rotary positions, 0 for none.
        shift: that GGUF has added to the values.
    """

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    shift: float = 0.0


class GGUFTensors:
    """A `TensorSource` over a GGUF file. A file is opened for each read, and nothing of it stays in memory.

    Attributes:
        shapes: of each tensor, by Hugging Face name.
        dtypes: "float32", "bfloat16" or "float16"; quantised tensors are read as float32.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is stored in a type that cannot be decoded.
    """

    def __init__(self, header: Header, stored: Mapping[str, Stored]):
        self._path, self._infos, self._stored = header.path, {}, dict(stored)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name, entry in stored.items():
            info = header.tensors.get(entry.name)
            _check(header.path, entry, info)
            if info.type not in READABLE:
                raise CheckpointError(
                    f"{header.path}: tensor '{entry.name}' is stored as {info.type.name}, which is not supported"
                )
            self._infos[name], self.shapes[name] = info, entry.shape
            self.dtypes[name] = "float32" if entry.shift else PLAIN.get(info.type, ("float32",))[0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, in its dtype of `dtypes`."""
        entry, info = self._stored[name], self._infos[name]
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        stop = max(start, stop)
        if entry.interleaved_heads:
            head = entry.shape[0] // entry.interleaved_heads
            first = start // head * head
            rows = half_split(self._rows(info, first, -(-stop // head) * head), head)
            return rows[start - first : stop - first]
        rows = self._rows(info, start, stop)
        return rows.astype(np.float32) - np.float32(entry.shift) if entry.shift else rows

    def _rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows of the first axis in the order of the file."""
        if info.type in PLAIN:
            dtype = PLAIN[info.type][1]
            step = info.bytes // info.shape[0]
            return self._raw(info, start * step, stop * step).view(dtype).reshape(stop - start, *info.shape[1:])
        if len(info.shape) == 1:
            return dequantize(self._raw(info, 0, info.bytes), info.type)[start:stop]
        return self._dequantised(info, start, stop)

    def _dequantised(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        row = info.bytes // info.shape[0]
        out = np.empty((stop - start, *info.shape[1:]), np.float32)
        step = max(1, CHUNK_ELEMENTS * info.shape[0] // info.elements)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            raw = self._raw(info, at * row, end * row).reshape(-1, info.row_bytes)
            out[at - start : end - start] = dequantize(raw, info.type).reshape(end - at, *info.shape[1:])
        return out

    def _raw(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a tensor."""
        try:
            raw = np.fromfile(self._path, np.uint8, stop - start, offset=info.offset + start)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if raw.size != stop - start:
            raise CheckpointError(f"{self._path}: truncated: the file ends within tensor '{info.name}'")
        return raw


def half_split(rows: np.ndarray, head: int) -> np.ndarray:
    """Rows of whole heads from the interleaved rotary order (pairs 2i, 2i+1) to the half-split one (i, i+head/2)."""
    pairs = rows.reshape(-1, head // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _check(path: Path, entry: Stored, info: TensorInfo | None) -> None:
    if info is None:
        raise CheckpointError(f"{path}: tensor '{entry.name}' is missing")
    if info.shape != entry.shape:
        raise CheckpointError(
            f"{path}: tensor '{entry.name}' has shape {list(info.shape)}; by the metadata it is {list(entry.shape)}"
        )
