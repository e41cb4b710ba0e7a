"""Evaluation of a model on documents: windows in, figures out."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from efficient_lm.data.store import TokenStore
from efficient_lm.errors import DataError
from efficient_lm.evaluation.bits_per_byte import evaluate
from efficient_lm.evaluation.windows import WindowSpec, window_batches
from efficient_lm.models.parameters import Parameters

BATCH_TOKENS = {"cpu": 2048}
"""Tokens that are scored at a time where nobody says how many windows: CPUs are fastest when a layer's activations stay
near the cores. See `benchmarks/evaluate.py`."""
ACCELERATOR_TOKENS = 1 << 16


def batch_limits(batch_size: int | None, sequence_length: int) -> tuple[int, int]:
    """Tokens and rows of a batch at most: `batch_size` rows, or what suits the device for None."""
    if batch_size is not None:
        return batch_size * sequence_length, batch_size
    tokens = BATCH_TOKENS.get(jax.default_backend(), ACCELERATOR_TOKENS)
    return tokens, tokens


def evaluate_documents(
    scorer: Callable,
    params: Parameters,
    store: TokenStore,
    documents: np.ndarray,
    spec: WindowSpec,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Score documents in windows.

    Args:
        scorer: from `make_scorer`.
        documents: int64, which ones of the store.
        batch_size: windows at a time; None takes what suits the device.

    Returns:
        What `evaluate` returns; `scored`, a sentence; `documents` and `windows`, their numbers; and the spec's own
        values by name.

    Raises:
        DataError: nothing in the text can be scored.
    """
    windows = spec.plan(store, documents)
    count = len(windows.lengths)
    if not count:
        raise DataError("there is no token to score: the documents are empty, or of one token with begin=none")
    limits = batch_limits(batch_size, spec.sequence_length)
    scores = evaluate(scorer, params, window_batches(windows, store, *limits, spec.sequence_length))
    # A window is no sequence of its own: whether all of it was right says nothing.
    del scores["sequence_accuracy"], scores["rows"]
    part = "" if count == windows.total else f" Of {windows.total:,} windows the first {count:,} are scored."
    return {
        "scored": spec.describe() + part,
        **scores,
        "documents": len(documents),
        "windows": count,
        **spec.dump(),
    }
