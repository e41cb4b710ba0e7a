"""A momentum over an estimate of the curvature, clipped."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Count, Fraction, Positive
from efficient_lm.training.optimizers.base import NonNegative, OptimizerSpec


class SophiaState(NamedTuple):
    """`momentum` and `curvature` (a diagonal), in the shape of the parameters."""

    count: jax.Array
    momentum: Any
    curvature: Any


class SophiaSpec(OptimizerSpec):
    """Sophia-G (Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer", algorithms 2 and 3).

    The curvature is the Gauss-Newton-Bartlett estimate: every `interval` steps the gradient is computed once more, for
    targets that are drawn from the model's own predictions, and squared. Unlike `optax.contrib.sophia` it needs no
    derivative of a derivative, which kernels do not have, and a fresh estimate serves the step that made it.

    Attributes:
        beta1, beta2: decay rates of momentum and curvature.
        gamma: the part of the curvature that a momentum is divided by; larger ones clip fewer entries.
        epsilon: least divisor.
        interval: steps between estimates.
    """

    kind: Literal["sophia"] = "sophia"
    learning_rate: Positive = 6e-4
    weight_decay: NonNegative = 0.2
    beta1: Fraction = 0.965
    beta2: Fraction = 0.99
    gamma: Positive = 0.05
    epsilon: Positive = 1e-12
    interval: Count = 10

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        def init(params: Parameters) -> SophiaState:
            return SophiaState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

        def update(
            grads: Parameters,
            state: SophiaState,
            params: Any = None,
            *,
            curvature: Callable[[], Parameters],
            **others: Any,
        ) -> tuple[Parameters, SophiaState]:
            """`curvature` gives the estimate for this step's batch, in the shape of the parameters."""
            momentum = optax.tree.update_moment(grads, state.momentum, self.beta1, 1)

            def estimated() -> Parameters:
                return jax.tree.map(self._blended, state.curvature, curvature(), is_leaf=_is_absent)

            due = state.count % self.interval == 0
            diagonal = jax.lax.cond(due, estimated, lambda: state.curvature)
            directions = jax.tree.map(
                lambda mean, bend: jnp.clip(mean / jnp.maximum(self.gamma * bend, self.epsilon), -1.0, 1.0),
                momentum,
                diagonal,
            )
            return directions, SophiaState(optax.safe_increment(state.count), momentum, diagonal)

        return optax.GradientTransformationExtraArgs(init, update)

    def _blended(self, kept: Any, found: jax.Array) -> Any:
        """An estimate that is not a number, as for drawn targets it may be, changes nothing."""
        if _is_absent(kept):
            return kept
        return jnp.where(jnp.isfinite(found), self.beta2 * kept + (1 - self.beta2) * found, kept)


def _is_absent(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
