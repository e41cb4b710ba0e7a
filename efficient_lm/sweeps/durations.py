"""What all steps of a run cost, and how many steps cost what they may."""

from collections.abc import Callable
from itertools import pairwise

from efficient_lm.config import RunConfig, TrainSpec
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.training.accounting import run_flops_per_token
from efficient_lm.training.portions import Portions

Seconds = dict[tuple[int, int], float]
"""Of a step, by the shape of its batch: rows, and tokens of a row."""

MOST_STEPS = 1 << 40


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with so many steps, unchecked."""
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def run_flops(config: RunConfig, model: LanguageModel) -> float:
    """FLOPs of all steps of a run: forward and backward, as the parts of the model count them."""
    return run_flops_per_token(config, model) * Portions(config.train).tokens()


def forward_flops_per_token(config: RunConfig, model: LanguageModel) -> float:
    """FLOPs of the forward pass for a token, on average where rows differ in length."""
    return Portions(config.train).mean(model.flops_per_token)


def run_seconds(train: TrainSpec, seconds: Seconds) -> float:
    """Of all steps of a run."""
    portions = Portions(train)
    changes = pairwise([*(portion.step for portion in portions.portions), train.steps])
    return sum(
        seconds[portion.batch] * (end - begin) for portion, (begin, end) in zip(portions.portions, changes, strict=True)
    )


def steps_for(total: Callable[[int], float], target: float) -> tuple[int, float]:
    """The number of steps whose total comes nearest to a target, and that total.

    Args:
        total: of so many steps; it grows with them, and may raise `ConfigError` for a number that does not work.

    Raises:
        ConfigError: no number of steps works; what the largest that was tried said.
    """
    known: dict[int, float] = {}
    fault: ConfigError | None = None

    def cost(steps: int) -> float:
        nonlocal fault
        try:
            known[steps] = total(steps)
        except ConfigError as error:
            # A warm-up or a stage of so many steps is what does not fit: that is too few of them.
            fault = error
            return 0.0
        return known[steps]

    above = 1
    while cost(above) < target and above < MOST_STEPS:
        above *= 2
    below = above // 2
    while below + 1 < above:
        middle = (below + above) // 2
        below, above = (middle, above) if cost(middle) < target else (below, middle)
    if not known:
        raise fault
    return min(known.items(), key=lambda item: abs(item[1] - target))
