"""The rank of attention maps by layer: where it is low, tokens attend alike, and layers can do without many of them."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.evaluation.by_row import mean_figures
from efficient_lm.models.block import Block, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

ROWS = 50
"""Rows that are looked at, as published."""

TOLERANCE = 0.01
"""Singular values count that are above this share of the map's largest. With a tolerance near rounding, every causal
map has full rank: its diagonal is never zero."""


def attention_ranks(
    model: LanguageModel,
    params: Parameters,
    batch: Mapping[str, np.ndarray],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[np.ndarray | None]:
    """Of each layer the mean rank of its heads' attention maps over rows (ARank; Luo et al. 2024, arXiv 2410.13859,
    section 3.2), float64 ``[heads]``; None for a layer whose mixer has no attention weights.

    Args:
        batch: a few rows of the loader (see `efficient_lm.data.packing.pack`).
    """
    figures = mean_figures(model, params, batch, _look, dtype)
    return [found.get("rank") for found in figures]


def lowest_ranks(ranks: Sequence[np.ndarray | None], share: float) -> list[int]:
    """The layers with the lowest mean rank, in order: `share` of those that have attention, at least one."""
    means = {number: float(np.mean(rank)) for number, rank in enumerate(ranks) if rank is not None}
    return sorted(sorted(means, key=lambda number: means[number])[: count_of(share, len(means))])


def count_of(share: float, layers: int) -> int:
    """So many of these layers are that share of them, at least one."""
    return max(1, math.floor(share * layers + 0.5))


def ranked_layers(model: LanguageModel) -> list[int]:
    """The layers, from 0, whose mixer has attention weights."""
    found = []
    for number, (segment, place, _) in enumerate(model.stack.places):
        blueprint = model.stack.periods[int(segment.removeprefix("segment_"))][int(place.removeprefix("layer_"))]
        block = blueprint(jax.tree.map(lambda declared: None, blueprint.declarations))
        if block.mixer is not None and hasattr(block.mixer.inner, "weights"):
            found.append(number)
    return found


def _look(block: Block, spec: BlockSpec, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    mixer = block.mixer and block.mixer.inner
    figures = {}
    if hasattr(mixer, "weights"):
        values = jnp.linalg.svd(mixer.weights(block.mixer_input(x, context), context), compute_uv=False)
        figures["rank"] = jnp.mean(jnp.sum(values > TOLERANCE * values[..., :1], axis=-1, dtype=jnp.float32), axis=0)
    return block(x, context)[0], figures
