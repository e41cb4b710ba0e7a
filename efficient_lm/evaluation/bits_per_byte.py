"""Bits per byte: cross entropy per UTF-8 byte of the text, comparable across tokenizers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import ObjectiveSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec

Batches = Iterable[dict[str, np.ndarray]]


def make_scorer(
    model: LanguageModel, dtype: jax.typing.DTypeLike = jnp.float32, objective: ObjectiveSpec | None = None
) -> Callable[[Parameters, dict[str, Any]], tuple[jax.Array, jax.Array]]:
    """A jitted ``(params, batch) -> (cross entropy sum in nats, token count)``."""
    objective = objective or CausalLMSpec()

    def score(params: Parameters, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        sums = objective.sums(model, params, batch, dtype)
        return sums.metrics["cross_entropy"], sums.weight

    return jax.jit(score)


def evaluate(
    scorer: Callable, params: Parameters, batches: Batches, place: Callable = lambda batch: batch
) -> dict[str, float]:
    """Score packed rows (see `efficient_lm.data.packing`).

    Args:
        scorer: from `make_scorer`.
        batches: arrays `[batch, time]`, with `target_bytes`: UTF-8 bytes of each target.
        place: puts a batch on the devices.

    Returns:
        `loss` (nats per token), `perplexity` per token, `bits_per_byte`, `tokens` and `bytes`. Every token of every
        document counts once, its end included; a document longer than a row is scored in disjoint windows.
    """
    nats = tokens = size = 0.0
    for batch in batches:
        # float64 on the host: a sum over millions of tokens keeps its digits.
        size += float(np.sum(batch["target_bytes"], dtype=np.float64))
        loss, weight = scorer(params, place({name: value for name, value in batch.items() if name != "target_bytes"}))
        nats, tokens = nats + float(loss), tokens + float(weight)
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss,
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "tokens": int(tokens),
        "bytes": int(round(size)),
    }
