"""Which part of a model a smaller one is: what a user asks for, checked against the model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.elastic import AXES, whole_units
from efficient_lm.models.language_model import LanguageModel

Part = float | Sequence[float] | Mapping[str, float]
"""A part of an axis: the same in every layer, one for each layer that has the axis, or one for each block by name."""

Units = Mapping[str, Mapping[str, int]]
"""By half of a block and axis, how many units it keeps."""


@dataclass(frozen=True)
class Choice:
    """A smaller model inside another.

    Attributes:
        layers: numbers of the layers that it has, ascending.
        units: of each of these, what its halves keep.
        width: of its residual stream; None: all.
    """

    layers: tuple[int, ...]
    units: tuple[Units, ...]
    width: int | None = None


def choose(model: LanguageModel, parts: Mapping[str, Part]) -> Choice:
    """The smaller model that has these parts of a model's axes, and all of the others.

    Args:
        parts: by axis (see `models.elastic.Axis`); of layers, the first or those whose numbers are listed.

    Raises:
        ConfigError: an axis the model does not have, a part outside (0, 1] or, where the model is trained for some
            granularities, none of them, a part that is no whole number of units, a layer or block there is not.
    """
    for axis in parts:
        if axis not in AXES:
            raise ConfigError(f"{axis}: no axis of a model; {nearest(axis, AXES)}")
    kept = _kept(model, parts.get("layers", 1))
    units: list[dict[str, dict[str, int]]] = [{} for _ in model.layers]
    for axis, part in parts.items():
        if axis not in ("layers", "width"):
            _count(model, axis, part, units)
    return Choice(kept, tuple(units[number] for number in kept), _width(model, parts.get("width")))


def _kept(model: LanguageModel, layers: Part) -> tuple[int, ...]:
    count = len(model.layers)
    if not isinstance(layers, Sequence):
        return tuple(range(whole_units("layers", _checked(model, "layers", layers), count)))
    for number in layers:
        if not isinstance(number, int) or not 0 <= number < count:
            raise ConfigError(f"layers: there is no layer {number}; they are 0 to {count - 1}")
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"layers: name each layer to keep once; got {list(layers)}")
    return tuple(sorted(layers))


def _width(model: LanguageModel, part: Part | None) -> int | None:
    return None if part is None else whole_units("width", _checked(model, "width", part), model.spec.width)


def _count(model: LanguageModel, axis: str, part: Part, units: list[dict[str, dict[str, int]]]) -> None:
    """Add what layers keep of an axis to `units`."""
    found = units_of(model)
    having = [number for number, halves in enumerate(found) if any(axis in sizes for sizes in halves.values())]
    if not having:
        there = dict.fromkeys(name for halves in found for sizes in halves.values() for name in sizes)
        raise ConfigError(f"{axis}: no layer of the model is elastic along it; {nearest(axis, [*there, 'layers'])}")
    for number, value in _by_layer(model, axis, part, having).items():
        value = _checked(model, axis, value)
        for half, sizes in found[number].items():
            if axis in sizes:
                where = f"{axis} of layer {number}" if len(having) > 1 else axis
                units[number].setdefault(half, {})[axis] = whole_units(where, value, sizes[axis])


def _by_layer(model: LanguageModel, axis: str, part: Part, having: Sequence[int]) -> dict[int, float]:
    if isinstance(part, Mapping):
        names = model.spec.layer_names()
        blocks = list(dict.fromkeys(names[number] for number in having))
        if not part:
            raise ConfigError(f"{axis}: it names no block; valid: {', '.join(blocks)}")
        for name in part:
            if name not in blocks:
                raise ConfigError(f"{axis}.{name}: no block with this axis has the name; {nearest(name, blocks)}")
        return {number: part[names[number]] for number in having if names[number] in part}
    if isinstance(part, Sequence):
        if len(part) != len(having):
            raise ConfigError(f"{axis}: {len(part)} values, but {len(having)} layers have the axis")
        return dict(zip(having, part, strict=True))
    return dict.fromkeys(having, part)


def _checked(model: LanguageModel, axis: str, part: Any) -> float:
    if isinstance(part, bool) or not isinstance(part, int | float):
        raise ConfigError(f"{axis}: expected a part of the whole, one number; got {part!r}")
    if not 0 < part <= 1:
        raise ConfigError(f"{axis}: a part is above 0 and at most 1; got {part:g}")
    grid = granularities(model).get(axis)
    if grid is not None:
        _check_trained(f"{axis}: the model is trained for {listed(grid)} of it", part, grid)
    return float(part)


def _check_trained(said: str, part: float, grid: Sequence[float]) -> None:
    """Raises `ConfigError`, which begins with what is `said`, for a part that is not on a grid."""
    if not any(math.isclose(part, value, rel_tol=1e-6) for value in grid):
        nearest_part = min(grid, key=lambda value: abs(value - part))
        raise ConfigError(f"{said}, and not for {part:g}; nearest: {nearest_part:g}")


def units_of(model: LanguageModel) -> list[dict[str, dict[str, int]]]:
    """Of each layer, by half, how many units its elastic axes have."""
    return [layer.resolved(model.spec.width).axis_sizes() for layer in model.layers]


def parts_of(model: LanguageModel, submodel: float | Mapping[str, Part], key: str = "submodel") -> Mapping[str, Part]:
    """The parts that one number stands for: of every axis that the model is trained to be smaller along.

    Args:
        key: what a user calls it.

    Raises:
        ConfigError: the model is not trained for any, or not for this one.
    """
    if isinstance(submodel, Mapping):
        return submodel
    grids = granularities(model)
    if not grids:
        raise ConfigError(
            f"{key}: the model was not trained to have smaller ones inside; name an axis, {key}.ffn={submodel:g}"
        )
    sizes = sorted({part for grid in grids.values() for part in grid})
    _check_trained(f"{key}: the model is trained for {listed(sizes)}", submodel, sizes)
    # An axis that is not trained for as little keeps its nearest larger part.
    return {axis: min(part for part in grid if part >= submodel * (1 - 1e-6)) for axis, grid in grids.items()}


def granularities(model: LanguageModel) -> dict[str, tuple[float, ...]]:
    """By axis the parts that a model is trained for; empty if it has not been trained for any."""
    return {} if model.spec.elastic is None else model.spec.elastic.axes


def listed(values: Iterable[float]) -> str:
    """Numbers, as a message has them."""
    return ", ".join(f"{value:g}" for value in values)
