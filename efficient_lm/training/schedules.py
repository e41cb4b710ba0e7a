"""Learning-rate schedules: kind → function of the step. Every one begins with a linear warm-up.

Steps count from 0. With `w` steps of warm-up, step s < w has ``peak * (s + 1) / w``, so that no step is spent at zero
and step ``w - 1`` is at the peak; the decay begins at step w and would end at step `steps`, one after the last.
A phase of several is a schedule of its own, whose warm-up rises from where the phase before ends.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Choice, Fraction, Listing, OneOf, Positive, Real, Spec
from efficient_lm.training.optimizers.base import ScheduleFunction

if TYPE_CHECKING:
    import jax


def _duration(value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        if value < 1:
            return float(value)
        if isinstance(value, int) or (value > 1 and value.is_integer()):
            return int(value)
    raise PydanticCustomError("duration", "expected a whole number of steps, or a fraction of the run below 1", {})


ShareFunction = Callable[["jax.Array"], "jax.Array"]
"""Step (from 0, float32) → share of the peak, float32."""

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

    def spans(self, steps: int, key: str = "schedule", whole: str = "the run") -> tuple[int, int, int]:
        """Steps of warm-up, of the peak and of the decay, of `steps`.

        Args:
            key, whole: what messages call this schedule, and what it is part of.

        Raises:
            ConfigError: they exceed `steps`.
        """
        warmup = steps_of(self.warmup, steps)
        if warmup > steps:
            raise ConfigError(f"{key}.warmup: {warmup} steps, but {whole} has {steps}; at most {steps}")
        return warmup, 0, steps - warmup

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        """Share of the peak when `progress` (0 to 1) of the decay has passed; `steps` as of `spans`."""
        raise TypeError(f"{type(self).__name__} does not define factor")

    def end(self, steps: int) -> float:
        """Share of the peak at step `steps`, one after the last."""
        spans = self.spans(steps)
        return self._end(spans) if spans[2] else 1.0

    def _end(self, steps: tuple[int, int, int]) -> float:
        """`factor` of a progress of 1."""
        raise TypeError(f"{type(self).__name__} does not define _end")

    def shares(self, steps: int, start: float = 0.0) -> ShareFunction:
        """The share of the peak as a function of the step; the warm-up rises from `start`."""
        import jax.numpy as jnp

        spans = warmup, stable, decay = self.spans(steps)

        def share(step: "jax.Array") -> "jax.Array":
            rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
            rise = rise if start == 0.0 else start + (1 - start) * rise
            progress = jnp.clip((step - warmup - stable) / max(decay, 1), 0.0, 1.0)
            return jnp.where(step < warmup, rise, self.factor(progress, spans))

        return share

    def build(self, peak: float, steps: int) -> ScheduleFunction:
        """The rate as a function of the step (int or traced scalar → float32), for a run of `steps`."""
        import jax.numpy as jnp

        share = self.shares(steps)

        def rate(step: "int | jax.Array") -> "jax.Array":
            return peak * share(jnp.asarray(step, jnp.float32))

        return rate


class FallingSpec(ScheduleSpec):
    """What goes from the peak to `final` times the peak."""

    final: Fraction = 0.0

    def _end(self, steps: tuple[int, int, int]) -> float:
        return self.final


class CosineSpec(FallingSpec):
    """Half a cosine from the peak to `final` times the peak (Loshchilov & Hutter 2017, eq. 5, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    final: Fraction = 0.1

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        import jax.numpy as jnp

        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(math.pi * progress))


class LinearSpec(FallingSpec):
    """A straight line from the peak to `final` times the peak."""

    kind: Literal["linear"] = "linear"

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        return 1 - (1 - self.final) * progress


class ConstantSpec(ScheduleSpec):
    """The peak to the end."""

    kind: Literal["constant"] = "constant"

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        return 1.0 + 0.0 * progress

    def _end(self, steps: tuple[int, int, int]) -> float:
        return 1.0


class InverseSquareRootSpec(ScheduleSpec):
    """``(1 + s / timescale) ** -0.5`` of the peak, s steps after the warm-up.

    With a timescale as long as the warm-up this is ``(warmup / step) ** 0.5`` (Vaswani et al. 2017, eq. 3); with
    another one it is Zhai et al. 2022 (arXiv 2106.04560, section 3.5), who end it with a line to zero: a phase.

    Attributes:
        timescale: steps after which half of the squared rate is left; null: as many as the warm-up's, at least one.
    """

    kind: Literal["inverse_square_root"] = "inverse_square_root"
    timescale: Annotated[Duration, Field(gt=0)] | None = None

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        return (1 + progress * (steps[2] / self._timescale(steps))) ** -0.5

    def _end(self, steps: tuple[int, int, int]) -> float:
        return (1 + steps[2] / self._timescale(steps)) ** -0.5

    def _timescale(self, steps: tuple[int, int, int]) -> int:
        return max(1, steps[0] if self.timescale is None else steps_of(self.timescale, sum(steps)))


class WarmupStableDecaySpec(FallingSpec):
    """The peak, and a decay at the end (Hu et al. 2024, MiniCPM, section 4).

    Attributes:
        decay: how long the rate falls.
        shape: ``linear``, or ``one_minus_sqrt`` (Hägele et al. 2024, section 3.2).
        final: share of the peak at the end.
    """

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay: Duration = 0.2
    shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"

    def spans(self, steps: int, key: str = "schedule", whole: str = "the run") -> tuple[int, int, int]:
        warmup, _, rest = super().spans(steps, key, whole)
        decay = steps_of(self.decay, steps)
        if decay > rest:
            raise ConfigError(
                f"{key}.decay: {decay} steps after {warmup} of warmup, but {whole} has {steps}; at most {rest}"
            )
        return warmup, rest - decay, decay

    def factor(self, progress: "jax.Array", steps: tuple[int, int, int]) -> "jax.Array":
        fallen = progress if self.shape == "linear" else progress**0.5
        return 1 - (1 - self.final) * fallen


class PhaseSpec(Spec):
    """A part of a run with a schedule of its own, or a straight line.

    Attributes:
        duration: how long; null takes what the other phases leave, and only one phase may.
        schedule: over the phase: its fractions are of the phase, and its warm-up rises from where the phase before
            ends.
        peak: what the schedule's peak is, as a share of the learning rate; null goes on from where the phase before
            ends (the first phase: 1).
        to: instead of a schedule: the share of the learning rate that a straight line from there goes to.
    """

    duration: Duration | None = None
    schedule: OneOf[ScheduleSpec] | None = None
    peak: Positive | None = None
    to: Annotated[Real, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "PhaseSpec":
        if (self.schedule is None) == (self.to is None):
            raise ValueError("a phase has either a schedule, or the share 'to' of the rate that a line goes to")
        if self.schedule is None and self.peak is not None:
            raise ValueError("'peak' is the one of a schedule, and this phase has none: set 'to' alone")
        return self

    def top(self, start: float) -> float:
        """The share of the learning rate that the schedule's peak is, where the phase before ends at `start`."""
        return start if self.peak is None else self.peak

    def end(self, start: float, steps: int) -> float:
        """The share of the learning rate behind the phase."""
        return self.to if self.schedule is None else self.top(start) * self.schedule.end(steps)

    def shares(self, start: float, before: float, steps: int) -> ShareFunction:
        """The share of the learning rate as a function of the phase's own step; `before` as `start`, 0 for the first.

        The first phase has nothing to go on from: its lines begin at one, its warm-up at zero.
        """
        if self.schedule is None:
            return lambda step: start + (self.to - start) * (step / steps)
        top = self.top(start)
        share = self.schedule.shares(steps, before / top)
        return lambda step: top * share(step)


class PhasesSpec(ScheduleSpec):
    """One phase after the other. Warm restarts (Loshchilov & Hutter 2017) are cosines with a `peak` and no warm-up.

    Attributes:
        phases: in order; together they last as long as the run.
        warmup: belongs to the phases' schedules; here it is 0.
    """

    kind: Literal["phases"] = "phases"
    warmup: Literal[0] = 0
    phases: Annotated[Listing[PhaseSpec], Field(min_length=1)]

    def spans(self, steps: int, key: str = "schedule", whole: str = "the run") -> tuple[int, int, int]:
        lengths, start = self.lengths(steps, key, whole), 1.0
        for index, (phase, length) in enumerate(zip(self.phases, lengths, strict=True)):
            where = f"{key}.phases[{index}]"
            if phase.schedule is not None:
                phase.schedule.spans(length, f"{where}.schedule", "the phase")
                if phase.top(start) == 0:
                    raise ConfigError(f"{where}.peak: the phase before ends at zero, and null stays there; set a share")
            start = phase.end(start, length)
        return 0, 0, steps

    def lengths(self, steps: int, key: str = "schedule", whole: str = "the run") -> list[int]:
        """Steps of each phase. Raises `ConfigError` where they are not those of the whole."""
        open_ones = [index for index, phase in enumerate(self.phases) if phase.duration is None]
        if len(open_ones) > 1:
            raise ConfigError(
                f"{key}.phases[{open_ones[1]}].duration: null, as in phase {open_ones[0]}; one phase takes what is left"
            )
        taken = self._lasting(range(len(self.phases)), steps)
        lengths, used = [], 0
        for index, phase in enumerate(self.phases):
            given = self._lasting(range(index + 1), steps) - used
            length = steps - taken if phase.duration is None else given
            used += given
            if length < 1 or used > steps:
                shown = "null" if phase.duration is None else f"{length} steps"
                raise ConfigError(
                    f"{key}.phases[{index}].duration: {shown}, but {whole} has {steps} steps, and the other phases "
                    f"take {taken - given}; at least 1 for each"
                )
            lengths.append(length)
        if sum(lengths) != steps:
            raise ConfigError(
                f"{key}.phases[{len(lengths) - 1}].duration: the phases take {taken} steps, but {whole} has {steps}; "
                "null takes what is left"
            )
        return lengths

    def _lasting(self, phases: range, steps: int) -> int:
        """Steps of the phases whose duration is given; fractions are rounded together, so that their sum is right."""
        given = [self.phases[index].duration or 0 for index in phases]
        whole = sum(duration for duration in given if isinstance(duration, int))
        return whole + round(sum(duration for duration in given if isinstance(duration, float)) * steps)

    def end(self, steps: int) -> float:
        share = 1.0
        for phase, length in zip(self.phases, self.lengths(steps), strict=True):
            share = phase.end(share, length)
        return share

    def shares(self, steps: int, start: float = 0.0) -> ShareFunction:
        import jax.numpy as jnp

        self.spans(steps)
        parts: list[tuple[int, ShareFunction]] = []
        begins, reached, before = 0, 1.0, start
        for phase, length in zip(self.phases, self.lengths(steps), strict=True):
            parts.append((begins, phase.shares(reached, before, length)))
            begins, reached = begins + length, phase.end(reached, length)
            before = reached

        def share(step: "jax.Array") -> "jax.Array":
            value = parts[0][1](step)
            for begin, part in parts[1:]:
                value = jnp.where(step < begin, value, part(step - begin))
            return value

        return share
