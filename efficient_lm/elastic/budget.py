"""What a submodel costs, known without making it, and what it may cost at most."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pydantic import model_validator

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Blueprint, Initialization, count_parameters
from efficient_lm.models.stack import Stack
from efficient_lm.spec import Count, Positive, Spec

COUNTED = ("params", "flops_per_token", "cache_bytes")
"""Costs that follow from an architecture; ``latency_ms`` is measured."""
COSTS = (*COUNTED, "latency_ms")
STEPS, LAYERS = 16, 4
"""Tokens that are decoded in one measurement, and layers that they pass."""
REPEATS, SECONDS = 5, 0.3
"""Measurements, and how long they take together, at least; the fastest counts, for others' work only slows."""


class BudgetSpec(Spec):
    """What a submodel may cost at most.

    Attributes:
        params: values of its parameters.
        flops_per_token: of its forward pass, the head included.
        cache_bytes: of its caches for one sequence.
        latency_ms: to decode a token of one sequence, on this machine.
        length: tokens of the sequence that the last three are counted for; None: as in training.
    """

    params: Positive | None = None
    flops_per_token: Positive | None = None
    cache_bytes: Positive | None = None
    latency_ms: Positive | None = None
    length: Count | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> "BudgetSpec":
        if not self.limits:
            raise ConfigError(f"budget: say what a submodel may have at most: {', '.join(COSTS)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """By cost, what is allowed."""
        return {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}


def fits(costs: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether nothing costs more than it may."""
    return all(costs[name] <= limit for name, limit in limits.items())


def check_possible(limits: Mapping[str, float], smallest: Mapping[str, float]) -> None:
    """Refuse a budget that even the smallest submodel does not meet. Raises `ConfigError`."""
    for name, limit in limits.items():
        if smallest[name] > limit:
            raise ConfigError(
                f"budget.{name}: {_figure(limit)}, but no submodel has less than {_figure(smallest[name])}"
            )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.4g}"


class Meter:
    """Costs of layers and of what is around them; of layers of one size once.

    Args:
        length: tokens of the sequence that caches, FLOPs and latency are those of.
        dtype: of activations and caches.
        latency: whether ``latency_ms`` is measured.
    """

    def __init__(self, length: int, dtype: jax.typing.DTypeLike = jnp.float32, latency: bool = False):
        self.length, self.dtype, self.latency = length, dtype, latency
        self._layers: dict[tuple[BlockSpec, int], dict[str, float]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are known."""
        return COSTS if self.latency else COUNTED

    def model(self, model: LanguageModel) -> dict[str, float]:
        """Of a whole model, of which nothing but its definition is needed."""
        layers = [self.layer(layer, model.spec.width) for layer in model.layers]
        outside = self.outside(model)
        return {name: outside[name] + sum(layer[name] for layer in layers) for name in self.names}

    def layer(self, spec: BlockSpec, width: int) -> dict[str, float]:
        """Of one layer in a model of this width."""
        found = self._layers.get((spec, width))
        if found is None:
            blueprint = Blueprint(lambda: spec.build(width, Initialization(0.02, 1.0)))
            found = {
                "params": count_parameters(blueprint.declarations),
                "flops_per_token": spec.flops_per_token(width, self.length),
                "cache_bytes": _bytes(lambda: self._cache(blueprint)),
            }
            if self.latency:
                found["latency_ms"] = self._layer_ms(spec, width)
            self._layers[spec, width] = found
        return found

    def outside(self, model: LanguageModel) -> dict[str, float]:
        """Of what is no layer: embedding, head, exits, a router in front of the layers."""
        declared = {name: values for name, values in model.declarations.items() if name != "stack"}
        caches = jax.eval_shape(lambda: model.init_caches(1, self.length, self.dtype))
        around = {name: values for name, values in caches.items() if name == "pregate"}
        found = {
            "params": count_parameters(declared),
            "flops_per_token": model.flops_around_layers(self.length),
            "cache_bytes": _bytes(lambda: around),
        }
        return found | ({"latency_ms": self._outside_ms(model)} if self.latency else {})

    def _cache(self, blueprint: Blueprint) -> Any:
        block = blueprint(jax.tree.map(lambda declared: None, blueprint.declarations))
        return block.init_cache(1, self.length, self.dtype)

    def _layer_ms(self, spec: BlockSpec, width: int) -> float:
        # As in a model, where reading a layer's parameters and caches from those of all takes time too. A layer that
        # takes the keys and values of another is measured as if it had its own: it takes that long at most.
        if spec.mixer is not None and spec.mixer.takes_keys:
            spec = spec.model_copy(update={"mixer": spec.mixer.with_own_keys()})
        stack = Stack((spec,) * LAYERS, width, Initialization(0.02, 1.0))
        inputs = spec.layer_input and jnp.ones((LAYERS, 1, 1, spec.layer_input.size), self.dtype)

        def step(params: Any, carry: Any, position: jax.Array) -> Any:
            context = Context(position[None, None], jnp.ones((1, 1), jnp.int32), "decode", layer_inputs=inputs)
            return stack(params, carry[0], context, carry[1])[:2]

        streams = () if spec.streams is None else (spec.streams.count,)
        carry = jnp.ones((*streams, 1, 1, width), self.dtype), stack.init_caches(1, self.length, self.dtype)
        return _decoding_ms(step, jax.jit(stack.init)(jax.random.key(0)), carry) / LAYERS

    def _outside_ms(self, model: LanguageModel) -> float:
        plain = model.spec.model_copy(update={"pregate": None}).build()

        def init(key: jax.Array) -> Any:
            return {name: values for name, values in plain.init(key).items() if name != "stack"}

        def step(params: Any, carry: Any, position: jax.Array) -> Any:
            context = Context(position[None, None], jnp.ones((1, 1), jnp.int32), "decode")
            x, context, _ = plain.entered(params, carry[0], context, None, self.dtype)
            token = jnp.argmax(plain.logits_from(params, plain.normed(params, x)), axis=-1)
            return token, carry[1] if context.layer_inputs is None else context.layer_inputs

        size = (
            (0,) if model.spec.layer_embedding is None else (len(model.layers), 1, 1, model.spec.layer_embedding.size)
        )
        carry = jnp.zeros((1, 1), jnp.int32), jnp.zeros(size, self.dtype)
        return _decoding_ms(step, jax.jit(init)(jax.random.key(0)), carry)


def _bytes(make: Callable[[], Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def _decoding_ms(step: Callable[[Any, Any, jax.Array], Any], params: Any, carry: Any) -> float:
    """Milliseconds of one step of many in one program, without what it takes to start a program."""

    @jax.jit
    def run(params: Any, carry: Any) -> Any:
        positions = jnp.arange(STEPS, dtype=jnp.int32)
        return lax.scan(lambda carry, position: (step(params, carry, position), None), carry, positions)[0]

    jax.block_until_ready(run(params, carry))
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < SECONDS:
        began = time.perf_counter()
        jax.block_until_ready(run(params, carry))
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken) / STEPS


@dataclass(frozen=True)
class LevelCosts:
    """Costs of every part of every layer: those of a submodel are sums.

    Attributes:
        outside: by cost, of what is no layer.
        layers: by cost, float64 ``[levels, layers]``.
    """

    outside: Mapping[str, float]
    layers: Mapping[str, np.ndarray]

    def of(self, levels: Sequence[int]) -> dict[str, float]:
        """Of the submodel whose layers have these levels."""
        places = np.arange(len(levels))
        return {
            name: float(self.outside[name] + table[np.asarray(levels), places].sum())
            for name, table in self.layers.items()
        }

    @property
    def smallest(self) -> dict[str, float]:
        """The least of each cost that a submodel has."""
        return {name: float(self.outside[name] + table.min(axis=0).sum()) for name, table in self.layers.items()}
