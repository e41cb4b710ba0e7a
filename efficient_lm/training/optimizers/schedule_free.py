"""Averages of the way in place of a schedule.

Three points are kept apart (Defazio et al. 2024, "The Road Less Scheduled"): `z` takes the base optimizer's steps, `x`
is the average of where `z` has been, and gradients are taken at ``y = beta x + (1 - beta) z``. The parameters in the
state of a run are `x`, the point to use: evaluation, checkpoints and extraction see nothing else. `z` is in the state
of the optimizer, and `gradient_point` gives the training step `y`.
"""

from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free, schedule_free_eval_params
from pydantic import Field

from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import Fraction, Positive
from efficient_lm.training.optimizers.base import NonNegative, OptimizerSpec, ScheduleFunction, is_placeholder


class ScheduleFreeSpec(OptimizerSpec):
    """What schedule-free optimizers share.

    Attributes:
        learning_rate: of the steps; its schedule should be a warm-up and then constant.
        beta: how near to the average gradients are taken.
        weight_power: an average weighs a step by this power of the largest learning rate so far.
    """

    whole: ClassVar[bool] = True
    replaces_decay: ClassVar[bool] = True

    beta: Annotated[Fraction, Field(gt=0)] = 0.9
    weight_power: NonNegative = 2.0

    def wrapped(self, chain: optax.GradientTransformation, schedule: ScheduleFunction) -> optax.GradientTransformation:
        # Optax counts its steps from 1, and the schedule from 0.
        inner = schedule_free(chain, lambda count: schedule(count - 1), self.beta, self.weight_power)

        def init(params: Parameters) -> ScheduleFreeState:
            if not is_placeholder(params):
                return inner.init(params)
            zero = jnp.zeros(())
            return ScheduleFreeState(zero, zero, zero, zero, chain.init(params), params)

        def update(
            grads: Parameters, state: ScheduleFreeState, params: Parameters, **extra: Any
        ) -> tuple[Parameters, ScheduleFreeState]:
            point = gradient_point(params, state)
            updates, state = inner.update(grads, state, point, **extra)
            average = schedule_free_eval_params(state, optax.apply_updates(point, updates))
            return jax.tree.map(jnp.subtract, average, params), state

        return optax.GradientTransformationExtraArgs(init, update)


class ScheduleFreeAdamWSpec(ScheduleFreeSpec):
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1): no first moment, since the average takes its place.

    Attributes:
        beta2: decay rate of the second moment.
        epsilon: added to its root.
    """

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    learning_rate: Positive = 2.5e-3
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        return optax.scale_by_rms(self.beta2, self.epsilon, eps_in_sqrt=False, bias_correction=True)


class ScheduleFreeSGDSpec(ScheduleFreeSpec):
    """Schedule-free gradient descent (Defazio et al. 2024, equations 3 to 5)."""

    update_size: ClassVar[str] = "gradient"

    kind: Literal["schedule_free_sgd"] = "schedule_free_sgd"
    learning_rate: Positive = 1.0
    weight_decay: NonNegative = 1e-4

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        return optax.identity()


def gradient_point(params: Parameters, state: Any) -> Parameters:
    """Where the gradient of a step is taken: the parameters themselves, unless the state is a schedule-free one's."""
    found = _schedule_free(state)
    if found is None:
        return params

    def between(z: Any, x: jax.Array) -> jax.Array:
        return x if isinstance(z, optax.MaskedNode) else found.b1 * x + (1.0 - found.b1) * z

    return jax.tree.map(between, found.z, params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))


def followed(state: Any, before: Parameters, after: Parameters) -> Any:
    """The state, after parameters were moved by something else than the optimizer: `z` moves with them."""
    found = _schedule_free(state)
    if found is None:
        return state

    def moved(z: Any, old: jax.Array, new: jax.Array) -> Any:
        return z if old is new or isinstance(z, optax.MaskedNode) else z + (new - old)

    z = jax.tree.map(moved, found.z, before, after, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    return jax.tree.map(
        lambda leaf: leaf._replace(z=z) if _is_schedule_free(leaf) else leaf, state, is_leaf=_is_schedule_free
    )


def _is_schedule_free(leaf: Any) -> bool:
    return isinstance(leaf, ScheduleFreeState)


def _schedule_free(state: Any) -> ScheduleFreeState | None:
    leaves = jax.tree.leaves(state, is_leaf=_is_schedule_free)
    return next((leaf for leaf in leaves if _is_schedule_free(leaf)), None)
