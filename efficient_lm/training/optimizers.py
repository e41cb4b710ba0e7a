"""Optimizers: kind → Optax transformation. The gradient arrives clipped; the schedule arrives as a function."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from efficient_lm.spec import Choice, Fraction, Positive, Real

if TYPE_CHECKING:
    import jax
    import optax

ScheduleFunction = Callable[["int | jax.Array"], "jax.Array"]
"""Step (from 0) → learning rate, float32."""


class OptimizerSpec(Choice, role="optimizer"):
    """An optimizer.

    Attributes:
        learning_rate: the schedule's peak.
    """

    learning_rate: Positive

    def build(self, schedule: ScheduleFunction, decay_mask: Any) -> "optax.GradientTransformation":
        """The transformation.

        Args:
            schedule: step → learning rate.
            decay_mask: booleans in the shape of the parameters: which of them weight decay applies to.
        """
        raise TypeError(f"{type(self).__name__} does not define build")


class AdamWSpec(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    The decay of a step is ``learning_rate * weight_decay * parameter``, as in PyTorch and Optax.

    Attributes:
        beta1, beta2: decay rates of the two moments.
        epsilon: added to the root of the second moment.
        weight_decay: of the parameters that declare it.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1

    def build(self, schedule: ScheduleFunction, decay_mask: Any) -> "optax.GradientTransformation":
        import optax

        return optax.adamw(
            schedule, self.beta1, self.beta2, self.epsilon, weight_decay=self.weight_decay, mask=decay_mask
        )
