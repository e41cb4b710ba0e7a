"""A dense model with mixture of depths around some of its layers."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.depth.mixture_of_depths import MixtureOfDepthsSpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import layer_parameters, spec_of_layers, with_layers
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters

RULE = MixtureOfDepthsSpec(capacity=0.5, weight="tanh", weight_scale=0.2, weight_offset=1.0, decide="router")
"""Weights near one, whatever a router says (p-MoD's TanhNorm), and half of the tokens."""

ROUTER_STD = 0.02
RIDGE = 0.01
SCALE = 0.1
"""Of fitted scores, whose order and signs are what counts: small ones leave weights near what they are at 0."""


def with_mixture_of_depths(
    model: LanguageModel,
    params: Parameters,
    layers: Sequence[int],
    key: jax.Array,
    rule: MixtureOfDepthsSpec = RULE,
    batch: Mapping[str, np.ndarray] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[ModelSpec, Parameters]:
    """The model with a depth rule around `layers`, for which `evaluation.attention_rank.lowest_ranks` can be asked
    (gamma-MoD; Luo et al. 2024, arXiv 2410.13859), and its parameters: those it had, and the rule's.

    Routers begin so that what runs is weighted about as before, and what passes by is what a layer changes least. With
    rows of text a router's score is the linear map of its input that comes nearest to how much the dense layer changes
    a token, ``log(|f(x) - x| / |x|)``, in tenths of a standard deviation above the value that a share of
    `rule.capacity` exceeds, so that a score above 0 is also the decision of a single token. (Layers behind the first of
    `layers` will read a stream that others have passed by, and have to learn where their threshold then is.) Without
    rows it is drawn, with standard deviation 0.02. Scores being small, p-MoD's weights begin within a few hundredths
    of 1. Predictors begin as in a new model, with the score's own decision.

    Args:
        layers: from 0; those of the capacity's list, if it is one, are in this order.
        key: of what is drawn.
        rule: its `every` has no meaning here and must be 1.
        batch: rows of text (see `efficient_lm.data.packing.pack`), all looked at together.
        dtype: of the computation that looks at them.

    Raises:
        ConfigError: a layer there is not, or that has a depth rule, or that the rule cannot wrap.
    """
    layers, before, width = sorted(set(layers)), list(model.layers), model.spec.width
    _check(layers, before, rule)
    rules = [rule.at(place, len(layers)) for place in range(len(layers))]
    changed = {
        number: before[number].model_copy(update={"depth": own}) for number, own in zip(layers, rules, strict=True)
    }
    spec = spec_of_layers(model.spec, [changed.get(number, layer) for number, layer in enumerate(before)])
    values, new = layer_parameters(model, params), spec.build()
    seen = None if batch is None else Layerwise(model, partial(_look, rule), dtype).batch(params, batch)
    for number, own in zip(layers, rules, strict=True):
        here = jax.random.fold_in(key, number)
        fresh = Blueprint(lambda own=own: own.build(width, Initialization(model.spec.init_std))).init(here)
        if seen is None:
            weight = ROUTER_STD * jax.random.normal(jax.random.fold_in(here, 1), (width,), jnp.float32)
            router = {"weight": weight, "bias": jnp.zeros((), jnp.float32)}
        else:
            router = _fitted(jax.tree.map(np.asarray, seen[number]), own.capacity)
        values[number] = values[number] | {"depth": fresh | {"router": router}}
    return spec, with_layers(new, {name: part for name, part in params.items() if name != "stack"}, values)


def _check(layers: Sequence[int], before: Sequence[BlockSpec], rule: MixtureOfDepthsSpec) -> None:
    if not layers or rule.every != 1:
        raise ConfigError("mixture of depths: name the layers that get the rule, and leave 'every' at 1")
    for number in layers:
        if not 0 <= number < len(before):
            raise ConfigError(f"mixture of depths: there is no layer {number}; the last is {len(before) - 1}")
        if before[number].depth is not None:
            raise ConfigError(f"mixture of depths: layer {number} has the rule '{before[number].depth.kind}' already")


def _look(
    rule: MixtureOfDepthsSpec, block: Block, spec: BlockSpec, x: jax.Array, context: Context
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a router would read of each token, and how much the block changes it."""
    y, wide = block(x, context)[0], x.astype(jnp.float32)
    change = jnp.linalg.norm(y.astype(jnp.float32) - wide, axis=-1) / jnp.linalg.norm(wide, axis=-1)
    read = wide
    if rule.norm is not None:
        norm = Blueprint(lambda: rule.norm.build(x.shape[-1]))
        read = norm(norm.init(jax.random.key(0)))(wide)
    return y, {"read": read, "change": jnp.log(change + 1e-6), "real": context.segment_ids != 0}


def _fitted(seen: dict[str, np.ndarray], capacity: float) -> Parameters:
    """The router whose score is nearest to the standardised change, by ridge regression, shifted as said above."""
    read, change = seen["read"][seen["real"]].astype(np.float64), seen["change"][seen["real"]].astype(np.float64)
    centred = read - read.mean(axis=0)
    target = (change - change.mean()) / max(change.std(), 1e-9)
    gram = centred.T @ centred / len(read)
    weight = np.linalg.solve(
        gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ target / len(read)
    )
    weight *= SCALE
    bias = -np.quantile(read @ weight, 1 - capacity)
    return {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
