"""Parameters from published tensors and back, by the description of a family."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy learns to cast bfloat16)
import numpy as np

from efficient_lm.errors import CheckpointError, nearest
from efficient_lm.interop.description import Tensor, Whole
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.tensors import DTYPES, TensorSource
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Declaration, Parameters, map_declarations, parameter_table

log = logging.getLogger(__name__)

Rows = Mapping[str, int]
"""Name of a published tensor → its rows."""

CHUNK_BYTES = 1 << 26
"""Read at a time; a tensor of several of our parameters is read whole."""

_ALIGNMENT = 64
"""Bytes; XLA takes host memory so aligned as its own, without a copy."""


@dataclass(frozen=True)
class _Place:
    """A parameter in the tree: its path, and for a layer its index along the axis `layers`."""

    path: str
    index: int | None
    declared: Declaration

    def array(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        whole = arrays[self.path]
        return whole if self.index is None else whole[self.index]


@dataclass(frozen=True)
class Entry:
    """A published tensor of one model, the parameters it is made of, and the one whose axes its join counts."""

    tensor: Tensor
    places: tuple[_Place, ...]
    by: Declaration

    def views(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.tensor.views([place.array(arrays) for place in self.places], self.declared)

    @property
    def declared(self) -> list[Declaration]:
        return [place.declared for place in self.places]

    def shape(self, views: Sequence[np.ndarray]) -> tuple[int, ...]:
        return self.tensor.join.shape(views, self.by)

    def pairs(self, tensor: np.ndarray, views: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.tensor.pairs(tensor, views, self.by)


def entries(family: Family, model: LanguageModel) -> list[Entry]:
    """Every published tensor that a model of this family has, in order: those whose parameters the model has.

    Raises:
        CheckpointError: a parameter of the model that the family has no tensor for.
    """
    table = dict(parameter_table(model.declarations))
    found = _entries(family.tensors, {path: _Place(path, None, declared) for path, declared in table.items()})
    by_layer = family.tensors_by_layer(model.spec)
    for number, (segment, layer, index) in enumerate(model.stack.places):
        prefix = f"stack.{segment}.{layer}."
        places = {
            path.removeprefix(prefix): _Place(path, index, declared.unstacked())
            for path, declared in table.items()
            if path.startswith(prefix)
        }
        tensors = [tensor.prefixed(family.layer.format(number)) for tensor in by_layer[number]]
        found += _entries(tensors, places)
    covered = {place.path for entry in found for place in entry.places}
    for path in table:
        if path not in covered:
            raise CheckpointError(f"model_type {family.model_type}: has no tensor for the parameter '{path}'")
    return found


def _entries(tensors: Sequence[Tensor], places: dict[str, _Place]) -> list[Entry]:
    found = []
    for tensor in tensors:
        if all(source.path in places for source in tensor.sources):
            ours = tuple(places[source.path] for source in tensor.sources)
            by = places[tensor.by].declared if tensor.by else ours[0].declared
            found += [Entry(one, ours, by) for one in tensor.numbered(ours[0].declared.shape[0])]
    return found


def read_parameters(
    family: Family, model: LanguageModel, source: TensorSource, where: str, device: jax.Device | None = None
) -> Parameters:
    """float32 parameters on a device, the first there is by default.

    Peak host memory: the parameters and one piece of a tensor.

    Raises:
        CheckpointError: a tensor that is missing, unexpected, or of another shape.
    """
    arrays = {path: _aligned(declared.shape) for path, declared in parameter_table(model.declarations)}
    names = Names(family, source, where)
    for entry in entries(family, model):
        _read(entry, arrays, source, names.take(entry.tensor), where)
    names.check_all_taken()
    # Moved one by one: on an accelerator, each host array is freed when its copy has arrived.
    device = device or jax.local_devices()[0]
    place = lambda path, _: jax.device_put(arrays.pop(path), device, may_alias=True)  # noqa: E731
    return map_declarations_with_path(place, model.declarations)


class Names:
    """Which of a source's tensors is which of ours: some are published without the base model's prefix."""

    def __init__(self, family: Family, source: TensorSource, where: str):
        self._family, self._source, self._where = family, source, where
        # A map to or from nothing has no values, and a model that lacks it is the same.
        self._left = {name for name, shape in source.shapes.items() if 0 not in shape}
        based = any(name.startswith(family.prefix) for name in source.shapes)
        self._strip = "" if based else family.prefix

    def find(self, tensor: Tensor) -> str | None:
        """The name a tensor has in the source; None if it is not there."""
        candidates = (tensor.name, *tensor.aliases)
        return next((n for c in candidates if (n := c.removeprefix(self._strip)) in self._source.shapes), None)

    def take(self, tensor: Tensor) -> list[str]:
        """The names of a tensor that must be there: one, or one for each piece. Raises `CheckpointError`."""
        wanted = tensor.pieces or (tensor.name,)
        found = [piece.removeprefix(self._strip) for piece in tensor.pieces] or [self.find(tensor)]
        for name, there in zip(wanted, found, strict=True):
            if there not in self._source.shapes:
                missing = name.removeprefix(self._strip)
                raise CheckpointError(f"{self._where}: no tensor '{missing}'; {nearest(missing, sorted(self._left))}")
            self._left.discard(there)
        return found

    def drop(self, name: str) -> None:
        """A tensor that is known to be superfluous."""
        self._left.discard(name)

    def check_all_taken(self) -> None:
        """Raises `CheckpointError` for a tensor that belongs to nothing."""
        ignored = [re.compile(pattern) for pattern in self._family.ignored]
        for name in sorted(self._left):
            if not any(pattern.search(name) for pattern in ignored):
                more = len(self._left) - 1
                raise CheckpointError(
                    f"{self._where}: unexpected tensor '{name}'{f' and {more} more' if more else ''}: "
                    f"a {self._family.model_type} model with this config.json does not have it"
                )


def _read(entry: Entry, arrays: dict[str, np.ndarray], source: TensorSource, names: list[str], where: str) -> None:
    views = entry.views(arrays)
    wanted, shapes = entry.shape(views), [tuple(source.shapes[name]) for name in names]
    found = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
    if found != wanted or any(shape[1:] != wanted[1:] for shape in shapes):
        raise CheckpointError(
            f"{where}: '{', '.join(names)}' has the shape {list(found)}, and config.json makes it {list(wanted)}"
        )
    if isinstance(entry.tensor.join, Whole):
        rows = max(1, CHUNK_BYTES // max(views[0][:1].nbytes, 1))
        for start in range(0, wanted[0], rows):
            stop = min(start + rows, wanted[0])
            views[0][start:stop] = source.read(names[0], start, stop)
        return
    tensors = [source.read(name) for name in names]
    tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    for ours, theirs in entry.pairs(tensor, views):
        ours[...] = theirs


def published(
    family: Family,
    model: LanguageModel,
    params: Parameters,
    names: Collection[str] = (),
    rows: Rows = MappingProxyType({}),
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 array of every tensor, one at a time; works for gradients as well.

    Args:
        names: of the tensors as they were read; where a tensor has several, the one it had is taken.
        rows: of the pieces as they were read, from `piece_rows`; by default each source is a piece.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in parameter_paths(params).items()}
    for entry in entries(family, model):
        views = entry.views(arrays)
        tensor = np.empty(entry.shape(views), np.float32)
        for ours, theirs in entry.pairs(tensor, views):
            theirs[...] = ours
        if entry.tensor.pieces:
            yield from _cut(entry.tensor.pieces, tensor, [view.shape[0] for view in views], rows)
        else:
            known = (name for name in (entry.tensor.name, *entry.tensor.aliases) if name in names)
            yield next(known, entry.tensor.name), tensor


def _cut(
    names: Sequence[str], tensor: np.ndarray, lengths: Sequence[int], rows: Rows
) -> Iterator[tuple[str, np.ndarray]]:
    start, known = 0, [rows.get(name, 0) for name in names]
    for name, length in zip(names, known if sum(known) == len(tensor) else lengths, strict=True):
        yield name, tensor[start : start + length]
        start += length


def piece_rows(family: Family, spec: ModelSpec, source: TensorSource) -> dict[str, int]:
    """Rows of the tensors that are pieces of another, by name."""
    names = [
        family.layer.format(number) + piece
        for number, tensors in enumerate(family.tensors_by_layer(spec))
        for tensor in tensors
        for piece in tensor.pieces
    ]
    return {name: source.shapes[name][0] for name in names if name in source.shapes}


def cast_exactly(tensor: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in `dtype` if that changes no value, and otherwise in float32."""
    with np.errstate(over="ignore"):
        narrow = tensor.astype(DTYPES[dtype])
    return narrow if np.array_equal(narrow.astype(np.float32), tensor, equal_nan=True) else tensor


def parameter_paths(params: Parameters) -> dict[str, Any]:
    """Dotted path → leaf."""
    return {".".join(step.key for step in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def map_declarations_with_path(function: Any, declarations: Parameters) -> Parameters:
    """Apply ``function(path, declaration)`` to every declaration of a nested dict."""
    paths = iter([path for path, _ in parameter_table(declarations)])
    return map_declarations(lambda declared: function(next(paths), declared), declarations)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
