"""Optimizers: kind → Optax transformation, one file per family. The gradient arrives clipped; the schedule arrives as a
function."""

from efficient_lm.spec import load_kinds
from efficient_lm.training.optimizers.base import OptimizerSpec, ScheduleFunction

load_kinds(__name__, __path__)

__all__ = ["OptimizerSpec", "ScheduleFunction"]
