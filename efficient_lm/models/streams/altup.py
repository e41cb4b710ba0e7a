"""Alternating updates: a wide representation of which each block computes one part and predicts the others."""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.parameters import Initialization, parameter
from efficient_lm.models.streams.base import Ends, Streams, StreamsSpec
from efficient_lm.spec import Natural, OneOf, Positive

LEAST = 1e-5
"""Least mean square of a stream that is brought to another magnitude."""


class AltUpSpec(StreamsSpec):
    """AltUp (Baykal et al. 2023, Alternating Updates, algorithm 1), with coefficients of each token (Gemma 3n).

    Of streams ``x_i``, ``a`` the active one, ``m(z) = tanh(R norm(z) / width)``:
    predictions ``p_j = x_j + sum_i P(m(x_a))_ji x_i``; the block computes ``y`` from ``p_a``; behind it
    ``x_j' = p_j + (C(m(y))_j + 1) (y - p_a)``. P, C and R are linear. In front of the first block the first stream is
    the embedding, and others are linear maps of it of equal magnitude; behind the last the mean is taken of the first
    and of linear maps of the others, brought to the first's magnitude.

    Attributes:
        active: the stream that blocks compute, from 0.
        coefficient_limit: bound of the weights of P and C while training; null: none.
        norm: of what R reads.
    """

    kind: Literal["altup"] = "altup"
    active: Natural = 0
    coefficient_limit: Positive | None = 120.0
    norm: OneOf[NormSpec] = RMSNormSpec()

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        if self.active >= self.count:
            yield "active", f"there is no stream {self.active} of {self.count}; valid: 0 to {self.count - 1}"

    def build(self, width: int, init: Initialization) -> "AltUp":
        return AltUp(self, width, init)

    def build_ends(self, width: int, init: Initialization) -> "AltUpEnds":
        return AltUpEnds(self.count, width, init)

    def flops_per_token(self, width: int) -> float:
        count = self.count
        return 2.0 * (2 * width * count + count**3 + count**2) + 2.0 * width * count**2

    def flops_of_ends(self, width: int) -> float:
        return 2.0 * 2 * (self.count - 1) * width**2


class AltUp(Streams):
    def __init__(self, spec: AltUpSpec, width: int, init: Initialization):
        count, self.active, self.limit, self.width = spec.count, spec.active, spec.coefficient_limit, width
        self.norm = spec.norm.build(width)
        self.router = Linear({"embed": width}, {"modes": count}, init=init)
        self.prediction = Linear({"modes": count}, {"streams": count, "sources": count}, init=init)
        self.correction = Linear({"modes": count}, {"streams": count}, init=init)

    def read(self, streams: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        coefficients = self._coefficients(self.prediction, streams[self.active], context)
        mixed = jnp.einsum("btji,ibtd->jbtd", coefficients.astype(streams.dtype), streams)
        predictions = streams + mixed
        return predictions[self.active], predictions

    def write(self, kept: jax.Array, y: jax.Array, context: Context) -> jax.Array:
        coefficients = self._coefficients(self.correction, y, context) + 1.0
        share = jnp.moveaxis(coefficients, -1, 0)[..., None].astype(y.dtype)
        return kept + share * (y - kept[self.active])

    def added(self, streams: jax.Array, addition: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """To all but the first, of the active one."""
        return streams.at[1:].add(addition(streams[self.active]))

    def _coefficients(self, of: Linear, x: jax.Array, context: Context) -> jax.Array:
        """float32 ``[batch, time, *outputs]``; bounded where numbers are random, which is when a model is trained."""
        modes = jnp.tanh(self.router(self.norm(x.astype(jnp.float32)) / self.width))
        weight = of.weight[...]
        if self.limit is not None and context.key is not None:
            weight = jnp.clip(weight, -self.limit, self.limit)
        return jnp.tensordot(modes, weight, 1)


class AltUpEnds(Ends):
    def __init__(self, count: int, width: int, init: Initialization):
        axes = {"streams": count - 1, "embed": width, "stream_embed": width}
        self.entry, self.exit = (
            parameter(axes, init.matrix(width), decay=True, matrix=((1,), (2,))) if count > 1 else None
            for _ in range(2)
        )

    def split(self, x: jax.Array) -> jax.Array:
        if self.entry is None:
            return x[None]
        others = jnp.einsum("btd,sde->sbte", x, self.entry[...].astype(x.dtype))
        return jnp.concatenate([x[None], _as_large(others, x)])

    def joined(self, streams: jax.Array) -> jax.Array:
        if self.exit is None:
            return streams[0]
        others = jnp.einsum("sbtd,sde->sbte", streams[1:], self.exit[...].astype(streams.dtype))
        return jnp.mean(jnp.concatenate([streams[:1], _as_large(others, streams[0])]), axis=0)


def _as_large(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` with the root mean square of `other`, over the last axis."""
    # Above zero: the root has no slope there, and an embedding of zeros is no reason to have none.
    wanted = jnp.sqrt(jnp.maximum(_mean_square(other), 1e-30))
    return (x.astype(jnp.float32) * wanted / jnp.sqrt(jnp.maximum(_mean_square(x), LEAST))).astype(x.dtype)


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
