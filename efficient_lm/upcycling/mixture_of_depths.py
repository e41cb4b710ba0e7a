"""A dense model with mixture of depths around some of its layers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.attention_rank import attention_ranks, count_of, lowest_ranks, ranked_layers
from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.depth.mixture_of_depths import MixtureOfDepthsSpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.layered import layer_parameters, spec_of_layers, with_layers
from efficient_lm.models.parameters import Blueprint, Initialization, Parameters
from efficient_lm.spec import Fraction
from efficient_lm.upcycling.base import UpcyclingSpec

RULE = MixtureOfDepthsSpec(capacity=0.5, weight="tanh", weight_scale=0.2, weight_offset=1.0, decide="router")
"""Weights near one, whatever a router says (p-MoD's TanhNorm), and half of the tokens."""

ROUTER_STD = 0.02
RIDGE = 0.01
SCALE = 0.1
"""Of fitted scores, whose order and signs are what counts: small ones leave weights near what they are at 0."""


class DepthsSpec(UpcyclingSpec):
    """Mixture of depths around the layers whose attention maps have the lowest rank (gamma-MoD, Luo et al. 2024).

    Attributes:
        layers: the layers that get the rule, from 0; null chooses by rank, as measured on rows of text.
        share: of the layers with attention, how many get it where ranks choose.
        rule: the depth rule, without `every`; a list of capacities is in the order of these layers.
    """

    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    share: Annotated[Fraction, Field(gt=0)] = 0.5
    rule: MixtureOfDepthsSpec = RULE

    @field_validator("rule", mode="before")
    @classmethod
    def _without_every(cls, rule: object) -> object:
        if isinstance(rule, Mapping) and "every" in rule:
            raise ValueError("'every' is left out: method.layers or method.share says which layers get the rule")
        return RULE.dump() | rule if isinstance(rule, Mapping) else rule

    def check(self, model: LanguageModel) -> None:
        """Raise `ConfigError` for layers that cannot have the rule, or none to choose from; no text is read."""
        if self.layers is not None:
            changed_spec(model, self.layers, self.rule)
            return
        candidates = self._candidates(model)
        if not candidates:
            raise ConfigError("method.layers: no layer has attention whose rank could choose it; say which layers")
        # Which layers it will be does not matter to most faults.
        changed_spec(model, candidates[: count_of(self.share, len(candidates))], self.rule)

    @staticmethod
    def _candidates(model: LanguageModel) -> list[int]:
        """Layers with attention weights and no rule that stays."""
        return [number for number in ranked_layers(model) if not _keeps_rule(model.layers[number])]

    def chosen(
        self,
        model: LanguageModel,
        params: Parameters,
        batch: Mapping[str, np.ndarray],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> list[int]:
        """The layers that get the rule, from 0, given rows of text."""
        if self.layers is not None:
            return sorted(set(self.layers))
        ranks = attention_ranks(model, params, batch, dtype)
        candidates = self._candidates(model)
        return lowest_ranks([rank if n in candidates else None for n, rank in enumerate(ranks)], self.share)


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
        batch: rows of text (see `efficient_lm.data.packing.pack`).
        dtype: of the computation that looks at them.

    Raises:
        ConfigError: a layer there is not, or that has a depth rule, or that the rule cannot wrap.
    """
    layers, width = sorted(set(layers)), model.spec.width
    spec, rules = changed_spec(model, layers, rule)
    values, new = layer_parameters(model, params), spec.build()
    seen = None if batch is None else _looked(Layerwise(model, partial(_look, rule), dtype), params, batch, layers)
    for number, own in zip(layers, rules, strict=True):
        here = jax.random.fold_in(key, number)
        fresh = Blueprint(lambda own=own: own.build(width, Initialization(model.spec.init_std))).init(here)
        if seen is None:
            weight = ROUTER_STD * jax.random.normal(jax.random.fold_in(here, 1), (width,), jnp.float32)
            router = {"weight": weight, "bias": jnp.zeros((), jnp.float32)}
        else:
            router = _fitted(seen[number], own.capacity)
        values[number] = values[number] | {"depth": fresh | {"router": router}}
    return spec, with_layers(new, {name: part for name, part in params.items() if name != "stack"}, values)


def changed_spec(
    model: LanguageModel, layers: Sequence[int], rule: MixtureOfDepthsSpec
) -> tuple[ModelSpec, list[MixtureOfDepthsSpec]]:
    """The architecture with a rule around `layers`, and the rule of each. Raises `ConfigError` as the whole does."""
    layers, changed, last = sorted(set(layers)), list(model.layers), len(model.layers) - 1
    if not layers or rule.every != 1:
        raise ConfigError("mixture of depths: name the layers that get the rule, and leave 'every' at 1")
    for number in layers:
        if not 0 <= number <= last:
            raise ConfigError(f"method.layers: there is no layer {number}; valid: 0 to {last}")
        if _keeps_rule(changed[number]):
            raise ConfigError(
                f"method.layers: layer {number} has the depth rule '{changed[number].depth.kind}' already"
            )
    try:
        rules = [rule.at(place, len(layers)) for place in range(len(layers))]
    except ConfigError as error:
        raise ConfigError(f"method.rule: {error}") from None
    for number, own in zip(layers, rules, strict=True):
        changed[number] = changed[number].model_copy(update={"depth": own})
    return spec_of_layers(model.spec, changed), rules


def _keeps_rule(layer: BlockSpec) -> bool:
    """Whether a layer has a rule that mixture of depths cannot take the place of: all but those of training alone."""
    return layer.depth is not None and layer.depth.passes_by


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


def _looked(
    layerwise: Layerwise, params: Parameters, batch: Mapping[str, np.ndarray], layers: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """What is seen in `layers`, of all rows; they are looked at one by one, so that large models fit."""
    rows = [
        jax.device_get(layerwise.batch(params, {name: values[row : row + 1] for name, values in batch.items()}))
        for row in range(len(batch["tokens"]))
    ]
    return {number: jax.tree.map(lambda *parts: np.concatenate(parts), *[row[number] for row in rows])
            for number in layers}  # fmt: skip


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
