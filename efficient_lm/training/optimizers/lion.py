"""The sign of a momentum."""

from typing import Literal

import optax

from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Fraction, Positive
from efficient_lm.training.optimizers.base import NonNegative, OptimizerSpec


class LionSpec(OptimizerSpec):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

    Every entry moves by the learning rate: it wants one three to ten times smaller than AdamW's, and a weight decay as
    much larger.

    Attributes:
        beta1: of the mixture of momentum and gradient whose sign is taken.
        beta2: of the momentum that is kept.
    """

    kind: Literal["lion"] = "lion"
    learning_rate: Positive = 2e-4
    weight_decay: NonNegative = 0.5
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.beta1, self.beta2)
