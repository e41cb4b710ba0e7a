"""Which parameters training changes."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.parameters import Declaration, Parameters, map_declarations, parameter_table

Trainable = Any
"""In the shape of the parameters: True, False, or a float32 array of ones and zeros that is broadcast to the leaf."""


def trainable(
    declarations: Parameters, only: Sequence[str] = (), freeze: Sequence[str] = (), frozen_experts: Sequence[int] = ()
) -> Trainable | None:
    """What training changes; None if it is everything.

    Args:
        only: regular expressions, found anywhere in a dotted path; what none of them matches is frozen. None: all.
        freeze: the same of what is frozen.
        frozen_experts: entries of the logical axis `experts` that are frozen in every parameter that has one.

    Raises:
        ConfigError: an expression that is none or matches nothing, an expert that there is not, nothing left.
    """
    if not (only or freeze or frozen_experts):
        return None
    table = parameter_table(declarations)
    names = [name for name, _ in table]
    kept = {name for name in names if not only} | matching("train.only", only, names)
    kept -= matching("train.freeze", freeze, names)
    counts = {d.shape[d.axes.index("experts")] for _, d in table if "experts" in d.axes}
    for number in frozen_experts:
        if number >= min(counts, default=0):
            raise ConfigError(f"train.frozen_experts: there is no expert {number}; {_experts(counts)}")
    if not kept or all(len(set(frozen_experts)) == count for count in counts) and not _without_experts(kept, table):
        raise ConfigError("train.only, train.freeze, train.frozen_experts: nothing is left to train")
    masks = [_mask(declared, frozen_experts) if name in kept else False for name, declared in table]
    return jax.tree.unflatten(jax.tree.structure(map_declarations(lambda declared: 0, declarations)), masks)


def _experts(counts: set[int]) -> str:
    return f"they are 0 to {min(counts) - 1}" if counts else "the model has no experts"


def _without_experts(kept: set[str], table: list[tuple[str, Declaration]]) -> bool:
    return any("experts" not in declared.axes for name, declared in table if name in kept)


def matching(key: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The dotted paths in which one of the regular expressions is found.

    Raises:
        ConfigError: an expression of this key that is none, or that nothing matches.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{key}: '{pattern}' is no regular expression: {error}") from error
        if not matches:
            raise ConfigError(f"{key}: no parameter's path has '{pattern}' in it; {nearest(pattern, names, limit=4)}")
        found |= matches
    return found


def _mask(declared: Declaration, frozen: Sequence[int]) -> Any:
    if not frozen or "experts" not in declared.axes:
        return True
    place = declared.axes.index("experts")
    mask = np.ones(declared.shape[place], np.float32)
    mask[list(frozen)] = 0
    return mask.reshape([-1 if axis == place else 1 for axis in range(len(declared.axes))])


def without_frozen(params: Parameters, chosen: Trainable | None) -> Parameters:
    """The parameters, through those of which that are frozen no gradient flows."""
    if chosen is None:
        return params
    return jax.tree.map(lambda leaf, mask: jax.lax.stop_gradient(leaf) if mask is False else leaf, params, chosen)


def masked(values: Parameters, chosen: Trainable | None) -> Parameters:
    """Gradients or updates, zero where a parameter or a part of it is frozen."""
    if chosen is None:
        return values
    return jax.tree.map(
        lambda leaf, mask: leaf if mask is True else leaf * (0.0 if mask is False else mask), values, chosen
    )


def for_trained(optimizer: optax.GradientTransformation, chosen: Trainable | None) -> optax.GradientTransformation:
    """The optimizer, with a state for parameters alone that are not wholly frozen."""
    if chosen is None:
        return optimizer
    return optax.masked(optimizer, jax.tree.map(lambda mask: mask is not False, chosen))
