"""A model as a list of layers: their specs and parameters taken apart, changed, and put together again.

A stack keeps the parameters of like layers in one array, and a spec says what layers have in common once. What changes
single layers (upcycling, extraction) works on lists with one entry per layer, and needs to know of neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Declaration, Parameters, is_declaration
from efficient_lm.validation import validate


def layer_parameters(model: LanguageModel, params: Parameters) -> list[Parameters]:
    """The parameters of each layer, as its block takes them."""
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], params["stack"][segment][place])
        for segment, place, index in model.stack.places
    ]


def layer_declarations(model: LanguageModel) -> list[Parameters]:
    """What each layer's parameters declare of themselves."""
    return [
        model.stack.periods[int(segment.removeprefix("segment_"))][int(place.removeprefix("layer_"))].declarations
        for segment, place, _ in model.stack.places
    ]


def with_layers(model: LanguageModel, outer: Parameters, layers: Sequence[Parameters]) -> Parameters:
    """Parameters of `model` from those of each layer, and from `outer` what is in no layer."""
    found: dict[str, dict[str, list[Parameters]]] = {}
    for (segment, place, _), values in zip(model.stack.places, layers, strict=True):
        found.setdefault(segment, {}).setdefault(place, []).append(values)
    stack = {
        segment: {
            place: jax.tree.map(lambda *leaves: jnp.stack(leaves), *values) for place, values in sorted_places(period)
        }
        for segment, period in found.items()
    }
    return {**outer, "stack": stack}


def sorted_places(period: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Entries ``layer_0, layer_1, ...`` by their number."""
    return sorted(period.items(), key=lambda item: int(item[0].removeprefix("layer_")))


def sliced(params: Parameters, declarations: Parameters, axis: str, indices: Sequence[int]) -> Parameters:
    """Parameters with some entries of a logical axis, in the order of `indices`; others are as they were."""
    chosen = np.asarray(indices)

    def take(declared: Declaration, leaf: jax.Array) -> jax.Array:
        return jnp.take(leaf, chosen, axis=declared.axes.index(axis)) if axis in declared.axes else leaf

    return jax.tree.map(take, declarations, params, is_leaf=is_declaration)


def joined(parts: Sequence[Parameters], declarations: Parameters, axis: str) -> Parameters:
    """Parameters whose entries of a logical axis are those of all `parts` in turn; others are those of the first."""

    def join(declared: Declaration, *leaves: jax.Array) -> jax.Array:
        return jnp.concatenate(leaves, declared.axes.index(axis)) if axis in declared.axes else leaves[0]

    return jax.tree.map(join, declarations, *parts, is_leaf=is_declaration)


def spec_of_layers(
    spec: ModelSpec, layers: Sequence[BlockSpec], sources: Sequence[int] | None = None, **changes: Any
) -> ModelSpec:
    """The model whose layers have these specs, in place of those of `spec`, with other fields changed by name.

    Layers that bore one name and are still of the same kinds go on sharing a block, with lists of the values that
    differ; others get blocks of their own, named after what is new in them. `sources` are the numbers of the layers of
    `spec` that they were, all of them if None. Raises `ConfigError` for a fault of the model's.
    """
    every, all_layers = spec.layer_names(), spec.layers()
    sources = range(len(every)) if sources is None else sources
    names, before = [every[number] for number in sources], [all_layers[number] for number in sources]
    members: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault((names[index], *_kinds(layer)), []).append(index)
    blocks: dict[str, Any] = {}
    layout = list(names)
    for (name, *_), indices in members.items():
        group = [layers[index] for index in indices]
        if all(before[index] == layers[index] for index in indices) and len(indices) == every.count(name):
            blocks[name] = spec.blocks[name].dump()
            continue
        whole = _folded(group)
        kept = _kinds(group[0]) == _kinds(before[indices[0]])
        parts = [(whole, indices)] if whole is not None else _distinct(group, indices)
        for values, places in parts:
            own = _unused(name if kept else f"{name}_{_new_kind(before[indices[0]], group[0])}", blocks)
            blocks[own] = values
            for place in places:
                layout[place] = own
    period = next(
        size for size in range(1, len(layout) + 1) if layout == layout[:size] * (len(layout) // size)
    )  # fmt: skip
    shape = {"blocks": blocks, "layout": layout[:period], "repeats": len(layout) // period}
    return validate(ModelSpec, {**spec.dump(), **shape, **changes}, "model")


def _kinds(layer: BlockSpec) -> tuple[str, ...]:
    return tuple("" if part is None else part.kind for part in (layer.mixer, layer.ffn, layer.depth))


def _new_kind(before: BlockSpec, layer: BlockSpec) -> str:
    """The kind of the part that was exchanged: the depth rule, or else the channel mixer."""
    kinds = _kinds(layer)
    return (kinds[2] if kinds[2] != _kinds(before)[2] else kinds[1]) or "none"


def _unused(name: str, blocks: Mapping[str, Any]) -> str:
    return name if name not in blocks else next(
        f"{name}_{number}" for number in range(2, len(blocks) + 3) if f"{name}_{number}" not in blocks
    )  # fmt: skip


def _distinct(layers: Sequence[BlockSpec], indices: Sequence[int]) -> list[tuple[dict[str, Any], list[int]]]:
    found: dict[BlockSpec, list[int]] = {}
    for layer, index in zip(layers, indices, strict=True):
        found.setdefault(layer, []).append(index)
    return [(layer.dump(), places) for layer, places in found.items()]


def _folded(layers: Sequence[BlockSpec]) -> dict[str, Any] | None:
    """One block with lists of what differs; None if it cannot say what these layers are."""
    values = _listed([layer.dump() for layer in layers])
    try:
        block = BlockSpec.model_validate(values)
        same = all(block.at(index, len(layers)) == layer for index, layer in enumerate(layers))
    except (ConfigError, ValidationError):
        return None
    return values if same else None


def _listed(values: Sequence[Any]) -> Any:
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {name: _listed([value[name] for value in values]) for name in first}
    return list(values)
