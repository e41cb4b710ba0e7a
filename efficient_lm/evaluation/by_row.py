"""Figures of a model's layers over the rows of a batch, looked at one by one, so that large ones fit."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from efficient_lm.evaluation.layerwise import Layerwise
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters


def mean_figures(
    model: LanguageModel,
    params: Parameters,
    batch: Mapping[str, np.ndarray],
    look: Callable,
    dtype: jax.typing.DTypeLike,
) -> list[dict[str, np.ndarray]]:
    """Of each layer, what `look` sees in it (see `Layerwise`), averaged over rows by their number of real tokens.

    Args:
        batch: of the loader (see `efficient_lm.data.packing.pack`); rows of padding alone have no part.
    """
    layers = Layerwise(model, look, dtype)
    totals: list[dict[str, np.ndarray]] = [{} for _ in model.layers]
    count = 0
    for row, segments in enumerate(batch["segment_ids"]):
        tokens = int(np.count_nonzero(segments))
        if not tokens:
            continue
        count += tokens
        found = layers.batch(params, {name: values[row : row + 1] for name, values in batch.items()})
        for total, figures in zip(totals, jax.device_get(found), strict=True):
            for name, values in figures.items():
                total[name] = total.get(name, 0.0) + tokens * np.asarray(values, np.float64)
    return [{name: values / max(count, 1) for name, values in total.items()} for total in totals]
