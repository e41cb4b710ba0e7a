"""Experts that compute next to nothing (MoE++, Jin et al. 2024, arXiv 2410.07348)."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.parameters import Initialization, parameter
from efficient_lm.spec import Natural, Positive, Spec


class ZeroExpertsSpec(Spec):
    """Experts that a router may choose besides those that compute; they are numbered after these, in this order.

    Attributes:
        zeros: experts whose result is 0: the token is discarded.
        copies: experts whose result is their input: the layer is skipped.
        constants: experts whose result is ``a x + b v``, with v learned and (a, b) the softmax of a linear map of x.
        share: factor of these experts in the balance loss, so that below 1 more tokens go to them; a capacity supposes
            that an expert which computes gets `share` times what one of these does.
    """

    zeros: Natural = 0
    copies: Natural = 0
    constants: Natural = 0
    share: Positive = 1.0

    @property
    def count(self) -> int:
        """How many there are."""
        return self.zeros + self.copies + self.constants

    def load(self, experts: int) -> float:
        """Part of all routes that one of so many experts that compute is to have."""
        return self.share / (self.share * experts + self.count)

    def weights(self, experts: int) -> jax.Array:
        """Of each expert in the balance loss, ``[experts + count]``."""
        return jnp.concatenate([jnp.ones(experts), jnp.full(self.count, self.share)])


class ZeroExperts(nnx.Module):
    """Called with what a router chose: what these experts add to each token."""

    def __init__(self, spec: ZeroExpertsSpec, width: int, init: Initialization):
        self.spec = spec
        constants = {"constants": spec.constants}
        self.mix = Linear({"embed": width}, {**constants, "parts": 2}, init=init) if spec.constants else None
        vectors = {**constants, "embed": width}
        self.vectors = parameter(vectors, init.output(width)) if spec.constants else None

    def __call__(self, x: jax.Array, routes: jax.Array, weights: jax.Array, experts: int) -> jax.Array:
        """`x [batch, time, width]`, routes and float32 weights `[batch, time, k]` → float32, shaped as `x`.

        `experts` is how many compute, that is the number of the first of these.
        """
        wide, first = x.astype(jnp.float32), experts + self.spec.zeros
        given = [
            jnp.sum(jnp.where(routes == first + place, weights, 0.0), axis=-1)
            for place in range(self.spec.copies + self.spec.constants)
        ]
        kept = sum(given[: self.spec.copies], jnp.zeros(x.shape[:2]))
        if self.mix is None:
            return wide * kept[..., None]
        parts = jax.nn.softmax(self.mix(wide)) * jnp.stack(given[self.spec.copies :], axis=-1)[..., None]
        kept = kept + jnp.sum(parts[..., 0], axis=-1)
        return wide * kept[..., None] + parts[..., 1] @ self.vectors[...]
