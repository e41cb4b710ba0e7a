"""Adam with decoupled weight decay."""

from typing import Literal

import optax

from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Fraction, Positive
from efficient_lm.training.optimizers.base import OptimizerSpec


class AdamWSpec(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), scaled as in PyTorch and Optax.

    Attributes:
        beta1, beta2: decay rates of the two moments.
        epsilon: added to the root of the second moment.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
