"""The units of a model's elastic axes, where they lie in its parameters, and how they change places."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.elastic import READ_BY, Elastic
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.layered import layer_declarations, layer_parameters, with_layers
from efficient_lm.models.parameters import Declaration, Parameters, is_declaration


@dataclass(frozen=True)
class Group:
    """Units of one part of a layer that may change places with each other.

    Attributes:
        path: names that lead to the parameters of the part inside a layer's.
        axis: see `models.elastic.Axis`.
        kind: of the part.
        count: units.
        along: logical axes that they lie along, as many consecutive places for each unit.
        fixed: why they cannot change places; None where they can.
    """

    path: tuple[str, ...]
    axis: str
    kind: str
    count: int
    along: tuple[str, ...]
    fixed: str | None

    @property
    def reader(self) -> str | None:
        """The name of the linear map whose inputs the units are; None where there is none."""
        return READ_BY.get(self.axis)

    def sums(self, values: np.ndarray, axes: Sequence[str]) -> np.ndarray | None:
        """The sum over everything that is a unit's, of `values` with these logical axes.

        Returns:
            float64 ``[units]``, or ``[experts, units]`` of units of many experts; None where no axis is the units'.
        """
        own = next((axis for axis in self.along if axis in axes), None)
        if own is None:
            return None
        kept = [axis for axis in dict.fromkeys(("experts", own)) if axis in axes]
        others = tuple(place for place, axis in enumerate(axes) if axis not in kept)
        ordered = [axis for axis in axes if axis in kept]
        total = np.asarray(values, np.float64).sum(axis=others).transpose([ordered.index(axis) for axis in kept])
        return total.reshape(*total.shape[:-1], self.count, -1).sum(axis=-1)


Worth = Sequence[Mapping[Group, np.ndarray]]
"""Of each layer, of each group what its units are worth: ``[units]``, or ``[experts, units]``."""


def groups_of(layer: BlockSpec) -> list[Group]:
    """The groups of a resolved layer, parts before what they are inside of."""
    halves = {"mixer": layer.mixer, "ffn": layer.ffn}
    return [group for name, part in halves.items() if part for group in _inside(part, (name, "inner"))]


def _inside(part: Elastic, path: tuple[str, ...]) -> Iterator[Group]:
    for name, inner in part.inside().items():
        yield from _inside(inner, (*path, name))
    sizes, fixed = part.axis_sizes(), part.fixed()
    for axis, along in part.laid_along().items():
        yield Group(path, axis, part.kind, sizes[axis], along, fixed.get(axis))


def unit_groups(model: LanguageModel) -> list[list[Group]]:
    """Of each layer its groups."""
    sharing = model.stack.sharing
    shared = [bool(given or taken) for given, taken in zip(sharing.hands_on, sharing.takes, strict=True)]
    groups = [groups_of(layer.resolved(model.spec.width)) for layer in model.layers]
    return [
        [_held(group) if between and group.axis == "heads" else group for group in layer]
        for layer, between in zip(groups, shared, strict=True)
    ]


def _held(group: Group) -> Group:
    """Heads whose keys and values several layers read."""
    return replace(group, fixed=group.fixed or "layers share their keys and values")


def below(tree: Parameters, path: Sequence[str]) -> Parameters:
    """What is at a path of a nested dict."""
    for name in path:
        tree = tree[name]
    return tree


def ordered(model: LanguageModel, params: Parameters, worth: Worth) -> Parameters:
    """The same function with the units that are worth most first, and of equal worth in the order they had.

    Args:
        worth: groups that are not in it stay as they are.

    Raises:
        ConfigError: units that cannot change places.
    """
    layers = layer_parameters(model, params)
    for number, (declared, groups) in enumerate(zip(layer_declarations(model), unit_groups(model), strict=True)):
        for group in groups:
            if group not in worth[number]:
                continue
            check_movable(group)
            order = np.argsort(-worth[number][group], axis=-1, kind="stable")
            layers[number] = _at(layers[number], declared, group.path, group, order)
    return with_layers(model, {name: values for name, values in params.items() if name != "stack"}, layers)


def check_movable(group: Group) -> None:
    """Raises `ConfigError` for units whose place means something."""
    if group.fixed is not None:
        raise ConfigError(
            f"order: {group.axis} of '{group.kind}' cannot change places: {group.fixed}; order=none keeps the first"
        )


def _at(params: Parameters, declared: Parameters, path: Sequence[str], group: Group, order: np.ndarray) -> Parameters:
    if path:
        name = path[0]
        return params | {name: _at(params[name], declared[name], path[1:], group, order)}

    def move(declared: Declaration, leaf: jax.Array) -> jax.Array:
        own = next((axis for axis in group.along if axis in declared.axes), None)
        return leaf if own is None else _moved(leaf, declared.axes, own, order)

    return jax.tree.map(move, declared, params, is_leaf=is_declaration)


def _moved(leaf: jax.Array, axes: Sequence[str], own: str, order: np.ndarray) -> jax.Array:
    place = axes.index(own)
    each = leaf.shape[place] // order.shape[-1]
    indices = (order[..., None] * each + np.arange(each)).reshape(*order.shape[:-1], -1)
    if order.ndim == 1:
        return jnp.take(leaf, indices, axis=place)
    shape = [1] * leaf.ndim
    shape[axes.index("experts")], shape[place] = indices.shape
    return jnp.take_along_axis(leaf, indices.reshape(shape), axis=place)
