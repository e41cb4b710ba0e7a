"""An exponential moving average of the parameters, beside them."""

from typing import Annotated

import jax
import jax.numpy as jnp
from pydantic import Field

from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Fraction, Natural, Spec


class AverageSpec(Spec):
    """An average of the parameters over the last steps (Polyak & Juditsky 1992), float32, where the parameters live.

    In step n after `start`, from 0, the average keeps ``min(decay, (1 + n) / (10 + n))`` of itself, so that where the
    run began is soon forgotten; until then it is the parameters themselves.

    Attributes:
        decay: what it keeps of itself in a step.
        start: steps before it begins.
        evaluate: whether validation during training scores the average, and not the parameters.
    """

    decay: Annotated[Fraction, Field(lt=1)] = 0.999
    start: Natural = 0
    evaluate: bool = True

    def moved(self, average: Parameters, params: Parameters, step: jax.Array) -> Parameters:
        """The average after a step that ended at `params`; `step` counts the ones before it, int32."""
        since = (step - self.start).astype(jnp.float32)
        kept = jnp.where(since < 0, 0.0, jnp.minimum(self.decay, (1 + since) / (10 + since)))
        return jax.tree.map(lambda mean, param: mean * kept + param * (1.0 - kept), average, params)
