"""How well tokens that decide for themselves run what a comparison of the whole row would have them run."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.evaluation.by_row import mean_figures
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

ROWS = 64
"""Rows that are looked at."""

FIGURES = ("depth_accuracy", "depth_share")


def decisions(
    model: LanguageModel,
    params: Parameters,
    batch: Mapping[str, np.ndarray],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[dict[str, float]]:
    """Of each layer with a depth rule that chooses tokens of a row: its `layer`, from 0; `depth_accuracy`, the share of
    real tokens whose own decision is what the comparison says; and `depth_share`, of those that decide to run.

    Args:
        batch: rows of the loader (see `efficient_lm.data.packing.pack`).
    """
    found = mean_figures(model, params, batch, _look, dtype)
    return [
        {"layer": number, **{name: float(value) for name, value in figures.items()}}
        for number, figures in enumerate(found)
        if figures
    ]


def _look(block: Block, spec: BlockSpec, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    y, _, auxiliary = block(x, context)
    return y, {name: auxiliary.observed[name] for name in FIGURES if name in auxiliary.observed}
