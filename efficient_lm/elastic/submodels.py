"""A smaller model made of a part of another: its architecture, and its parameters as slices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.elastic.choices import Choice, Units, units_of
from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.elastic import NumberingSpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import sliced, spec_of_layers
from efficient_lm.models.parameters import Declaration, Parameters, is_declaration
from efficient_lm.models.sharing import Sharing


def submodel_spec(model: LanguageModel, choice: Choice) -> ModelSpec:
    """The architecture of the part of a model that is chosen; elastic below its size where the model is.

    Raises:
        ConfigError: what is left does not work, such as fewer experts than a token takes.
    """
    spec, width = model.spec, choice.width or model.spec.width

    def cut(layer: BlockSpec, units: Units) -> BlockSpec:
        changed = width != spec.width or any(units.values())
        return layer.resolved(spec.width).cut(width, units) if changed else layer

    layers = [cut(model.layers[number], units) for number, units in zip(choice.layers, choice.units, strict=True)]
    _check_shared(model, choice, layers, width)
    changes: dict[str, Any] = {"width": width, "elastic": _below(model, choice), "numbering": _numbering(model, choice)}
    if len(layers) < len(model.layers) and spec.exits is not None:
        raise ConfigError("layers: the model has exits behind some of its layers; it keeps all of them")
    return spec_of_layers(spec, layers, choice.layers, **changes)


def submodel_parameters(
    model: LanguageModel, small: LanguageModel, params: Parameters, layers: Sequence[int]
) -> Parameters:
    """Of a model's parameters those of a smaller one: of every axis that is shorter there, the first values.

    Args:
        small: the smaller model, of `submodel_spec`.
        params: may be traced; gradients of the result reach the values it is made of, and no others.
        layers: which of the model's layers the smaller one has.
    """
    places = [model.stack.places[number] for number in layers]
    stack: dict[str, dict[str, Parameters]] = {}
    for number, (part, period) in enumerate(zip(small.stack.segments, small.stack.periods, strict=True)):
        name = f"segment_{number}"
        stack[name] = {}
        for place, blueprint in enumerate(period):
            sources = places[part.start + place : part.start + part.layers : len(period)]
            gathered = _gathered(params["stack"], sources)
            declared = jax.tree.map(
                lambda d, count=part.repeats: d.stacked(count), blueprint.declarations, is_leaf=is_declaration
            )
            stack[name][f"layer_{place}"] = first_values(gathered, declared)
    outer, declared = ({name: of[name] for name in of if name != "stack"} for of in (params, small.declarations))
    if len(layers) < len(model.layers):
        outer = sliced(outer, {name: model.declarations[name] for name in outer}, "layers", layers)
    return {**first_values(outer, declared), "stack": stack}


def _gathered(stack: Parameters, sources: Sequence[tuple[str, str, int]]) -> Parameters:
    """The parameters of some layers, stacked; without a copy where they are together already."""
    segments = {(segment, place) for segment, place, _ in sources}
    if len(segments) == 1:
        segment, place, first = sources[0]
        rows = [index for _, _, index in sources]
        if rows == list(range(first, first + len(rows))):
            return jax.tree.map(lambda leaf: leaf[first : first + len(rows)], stack[segment][place])
        return jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], stack[segment][place])
    layers = [
        jax.tree.map(lambda leaf, index=index: leaf[index], stack[segment][place]) for segment, place, index in sources
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def first_values(params: Parameters, declarations: Parameters) -> Parameters:
    """The first values along every axis that is declared shorter than it is."""

    def cut(declared: Declaration, leaf: jax.Array) -> jax.Array:
        if leaf.ndim != len(declared.shape):
            raise ValueError(f"{declared.axes} is no slice of {leaf.shape}")
        return leaf if leaf.shape == declared.shape else leaf[tuple(slice(size) for size in declared.shape)]

    return jax.tree.map(cut, declarations, params, is_leaf=is_declaration)


def _check_shared(model: LanguageModel, choice: Choice, layers: Sequence[BlockSpec], width: int) -> None:
    """Whether layers still take the keys and values that they took. Raises `ConfigError`."""
    before, after = model.stack.sharing.sources, Sharing(layers, width).sources
    for number, place in zip(choice.layers, after, strict=True):
        source = before[number]
        if source is None:
            continue
        if source not in choice.layers:
            raise ConfigError(
                f"layers: layer {number} takes the keys and values of layer {source}; keep both or neither"
            )
        if place is None or choice.layers[place] != source:
            raise ConfigError(
                f"heads: layer {number} takes the keys and values of layer {source}; both keep the same part of them"
            )


def _numbering(model: LanguageModel, choice: Choice) -> dict[str, Any] | None:
    """The places that layers keep; None where none is left out."""
    before = model.spec.numbering
    if len(choice.layers) == len(model.layers):
        return before and before.dump()
    numbers = model.stack.numbers
    return NumberingSpec(layers=tuple(numbers[place] for place in choice.layers), of=model.stack.depth).dump()


def _below(model: LanguageModel, choice: Choice) -> dict[str, Any] | None:
    """The granularities that are still inside; None where nothing smaller is, or layers keep different parts."""
    elastic = model.spec.elastic
    if elastic is None:
        return None
    below = {}
    for axis, grid in elastic.axes.items():
        part = _part(model, choice, axis)
        if part is None:
            continue
        left = [value / part for value in grid if value <= part * (1 + 1e-6)]
        if len(left) > 1:
            below[axis] = [*left[:-1], 1.0]
    return {"combine": elastic.combine, **below} if below else None


def _part(model: LanguageModel, choice: Choice, axis: str) -> float | None:
    """What all layers keep of an axis; None if they differ."""
    if axis == "width":
        return (choice.width or model.spec.width) / model.spec.width
    if axis == "layers":
        whole = choice.layers == tuple(range(len(choice.layers)))
        return len(choice.layers) / len(model.layers) if whole else None
    found = units_of(model)
    parts = {
        units.get(half, {}).get(axis, sizes[axis]) / sizes[axis]
        for number, units in zip(choice.layers, choice.units, strict=True)
        for half, sizes in found[number].items()
        if axis in sizes
    }
    return parts.pop() if len(parts) == 1 else None
