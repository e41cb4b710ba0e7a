"""Learning-rate schedules: kind → function of the step. Every one begins with a linear warm-up.

Steps count from 0. With `w` steps of warm-up, step s < w has ``peak * (s + 1) / w``, so that no step is spent at zero
and step ``w - 1`` is at the peak; the decay begins at step w and would end at step `steps`, one after the last.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Choice, Fraction
from efficient_lm.training.optimizers import ScheduleFunction

if TYPE_CHECKING:
    import jax


def _duration(value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        if value < 1:
            return float(value)
        if isinstance(value, int) or (value > 1 and value.is_integer()):
            return int(value)
    raise PydanticCustomError("duration", "expected a whole number of steps, or a fraction of the run below 1", {})


Duration = Annotated[int | float, BeforeValidator(_duration)]
"""Steps where it is a whole number of at least 1, a fraction of the run where it is below 1."""


def steps_of(duration: int | float, steps: int) -> int:
    """A duration in steps of a run of `steps`."""
    return duration if isinstance(duration, int) else round(duration * steps)


class ScheduleSpec(Choice, role="schedule"):
    """A learning rate over a run.

    Attributes:
        warmup: how long the rate rises to its peak.
    """

    warmup: Duration = 0.05

    def spans(self, steps: int) -> tuple[int, int, int]:
        """Steps of warm-up, of the peak and of the decay. Raises `ConfigError` where they exceed the run."""
        warmup = steps_of(self.warmup, steps)
        if warmup > steps:
            raise ConfigError(f"schedule.warmup: {warmup} steps, but the run has {steps}; at most {steps}")
        return warmup, 0, steps - warmup

    def factor(self, progress: "jax.Array") -> "jax.Array":
        """Share of the peak when `progress` (0 to 1) of the decay has passed."""
        raise TypeError(f"{type(self).__name__} does not define factor")

    def build(self, peak: float, steps: int) -> ScheduleFunction:
        """The rate as a function of the step (int or traced scalar → float32), for a run of `steps`."""
        import jax.numpy as jnp

        warmup, stable, decay = self.spans(steps)

        def rate(step: "int | jax.Array") -> "jax.Array":
            step = jnp.asarray(step, jnp.float32)
            rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
            progress = jnp.clip((step - warmup - stable) / max(decay, 1), 0.0, 1.0)
            return peak * jnp.where(step < warmup, rise, self.factor(progress))

        return rate


class CosineSpec(ScheduleSpec):
    """Half a cosine from the peak to `final` times the peak (Loshchilov & Hutter 2017, eq. 5, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    final: Fraction = 0.1

    def factor(self, progress: "jax.Array") -> "jax.Array":
        import jax.numpy as jnp

        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(math.pi * progress))


class LinearSpec(ScheduleSpec):
    """A straight line from the peak to `final` times the peak."""

    kind: Literal["linear"] = "linear"
    final: Fraction = 0.0

    def factor(self, progress: "jax.Array") -> "jax.Array":
        return 1 - (1 - self.final) * progress


class ConstantSpec(ScheduleSpec):
    """The peak to the end."""

    kind: Literal["constant"] = "constant"

    def factor(self, progress: "jax.Array") -> "jax.Array":
        return 1.0 + 0.0 * progress


class WarmupStableDecaySpec(ScheduleSpec):
    """The peak, and a decay at the end (Hu et al. 2024, MiniCPM, section 4).

    Attributes:
        decay: how long the rate falls.
        shape: ``linear``, or ``one_minus_sqrt`` (Hägele et al. 2024, section 3.2).
        final: share of the peak at the end.
    """

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay: Duration = 0.2
    shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"
    final: Fraction = 0.0

    def spans(self, steps: int) -> tuple[int, int, int]:
        warmup, _, rest = super().spans(steps)
        decay = steps_of(self.decay, steps)
        if decay > rest:
            raise ConfigError(
                f"schedule.decay: {decay} steps after {warmup} of warmup, but the run has {steps}; at most {rest}"
            )
        return warmup, rest - decay, decay

    def factor(self, progress: "jax.Array") -> "jax.Array":
        fallen = progress if self.shape == "linear" else progress**0.5
        return 1 - (1 - self.final) * fallen
