"""Gradient descent with momentum, plain and with learning rates that the first gradient sets."""

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficient_lm.models.parameters import Declaration, Parameters, map_declarations
from efficient_lm.spec import Fraction, Positive
from efficient_lm.training.optimizers.base import NonNegative, OptimizerSpec, describe, is_placeholder


class SGDSpec(OptimizerSpec):
    """Gradient descent with momentum (Sutskever et al. 2013), as in PyTorch: ``buffer = momentum * buffer + gradient``.

    Attributes:
        momentum: 0 keeps no state.
        nesterov: whether the gradient is added once more to the decayed buffer.
    """

    update_size: ClassVar[str] = "gradient"

    kind: Literal["sgd"] = "sgd"
    learning_rate: Positive = 0.1
    weight_decay: NonNegative = 1e-3
    momentum: Fraction = 0.9
    nesterov: bool = False

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


class SaIState(NamedTuple):
    """`momentum` in the shape of the parameters; `rates`, of each block, with axes of size 1 where it is one block."""

    count: jax.Array
    momentum: Any
    rates: Any


class SGDSaISpec(OptimizerSpec):
    """SGD-SaI (Xu et al. 2024, "No More Adam: Learning Rate Scaling at Initialization is All You Need").

    The first gradient gives each block, which is one parameter of one layer, its signal-to-noise ratio, the norm over
    the standard deviation of its entries; the learning rate of the block is from then on scaled by it, relative to the
    largest. A block whose entries are all alike has no noise to measure, and gets the least ratio that one of its size
    can have, the root of its size.

    Attributes:
        momentum: decay rate of the one average that is kept, which begins with the first gradient.
    """

    update_size: ClassVar[str] = "gradient"

    kind: Literal["sgd_sai"] = "sgd_sai"
    learning_rate: Positive = 0.1
    weight_decay: NonNegative = 1e-3
    momentum: Fraction = 0.9

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        def init(params: Parameters) -> SaIState:
            if is_placeholder(params):
                return SaIState(jnp.zeros((), jnp.int32), params, params)
            return SaIState(
                jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), map_declarations(_no_rates, declarations)
            )

        def update(grads: Parameters, state: SaIState, params: Any = None) -> tuple[Parameters, SaIState]:
            first = state.count == 0
            ratios = describe(_ratio, declarations, grads)
            largest = jnp.max(jnp.stack([jnp.max(ratio) for ratio in jax.tree.leaves(ratios)]))
            rates = jax.tree.map(lambda ratio, kept: jnp.where(first, ratio / largest, kept), ratios, state.rates)
            momentum = jax.tree.map(
                lambda mean, grad: jnp.where(first, grad, self.momentum * mean + (1 - self.momentum) * grad),
                state.momentum,
                grads,
            )
            directions = jax.tree.map(jnp.multiply, momentum, rates)
            return directions, SaIState(optax.safe_increment(state.count), momentum, rates)

        return optax.GradientTransformation(init, update)


def _no_rates(declared: Declaration) -> jax.Array:
    sizes = [size if axis in declared.batch_axes else 1 for axis, size in enumerate(declared.shape)]
    return jnp.zeros(sizes, jnp.float32)


def _ratio(declared: Declaration, grad: jax.Array) -> jax.Array:
    """The signal-to-noise ratio of each block, float32."""
    axes = declared.own_axes
    count = grad.size / _no_rates(declared).size
    power = jnp.mean(jnp.square(grad), axis=axes, keepdims=True)
    noise = jnp.var(grad, axis=axes, keepdims=True)
    return jnp.where(noise > 0, jnp.sqrt(count * power / jnp.where(noise > 0, noise, 1.0)), jnp.sqrt(count))
