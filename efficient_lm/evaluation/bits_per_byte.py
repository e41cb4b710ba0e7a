"""Bits per byte: cross entropy per UTF-8 byte of the text, comparable across tokenizers."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.evaluation.token_losses import token_losses
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters

Batches = Iterable[dict[str, np.ndarray]]
Sums = tuple[np.ndarray, np.ndarray]


def make_scorer(
    model: LanguageModel, dtype: jax.typing.DTypeLike = jnp.float32
) -> Callable[[Parameters, dict[str, Any]], tuple[jax.Array, jax.Array]]:
    """A jitted ``(params, batch) -> (cross entropy sums in nats, token counts)``.

    Both are float32 ``[time]``, by the target's position in its window; weighted targets alone count. With `chosen`
    (see `token_losses`), `targets`, `weights` and `target_positions` are those of the chosen places.
    """

    def score(params: Parameters, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        nats = jnp.where(batch["weights"] > 0, token_losses(model, params, batch, dtype).losses, 0)
        positions = batch.get("target_positions", batch["positions"])
        zeros = jnp.zeros(batch["tokens"].shape[1], jnp.float32)
        return zeros.at[positions].add(nats * batch["weights"]), zeros.at[positions].add(batch["weights"])

    return jax.jit(score)


def evaluate(
    scorer: Callable, params: Parameters, batches: Batches, place: Callable = lambda batch: batch
) -> dict[str, Any]:
    """Score windows of text (see `efficient_lm.data.packing.pack` and `efficient_lm.evaluation.windows`).

    Args:
        scorer: from `make_scorer`.
        batches: arrays `[batch, time]`, with `target_bytes`: UTF-8 bytes of each target.
        place: puts a batch on the devices.

    Returns:
        `loss` (nats per token), `perplexity` per token, `bits_per_byte`, `tokens` and `bytes` of what has a weight;
        and `loss_by_context`: a list of the mean loss of tokens by how many tokens the model had read in their window
        when it predicted them, in buckets of powers of two (`first`, `last`, `tokens`, `loss`).
    """
    nats, tokens, size = np.zeros(0), np.zeros(0), 0.0

    def add(sums: tuple[jax.Array, jax.Array] | None) -> None:
        nonlocal nats, tokens
        if sums is not None:
            # float64 on the host: a sum over millions of tokens keeps its digits.
            nats, tokens = (_longer(total, np.asarray(part)) for total, part in zip((nats, tokens), sums, strict=True))

    waiting = None
    for batch in batches:
        size += float(np.sum(batch["target_bytes"] * batch["weights"], dtype=np.float64))
        sums = scorer(params, place({name: value for name, value in batch.items() if name != "target_bytes"}))
        # Sums are read one batch late, so that the device is never idle while the host prepares the next.
        add(waiting)
        waiting = sums
    add(waiting)
    loss = nats.sum() / max(tokens.sum(), 1)
    return {
        "loss": float(loss),
        "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else float(loss),
        "bits_per_byte": float(nats.sum() / math.log(2) / max(size, 1)),
        "tokens": int(tokens.sum()),
        "bytes": int(round(size)),
        "loss_by_context": list(_by_context(nats, tokens)),
    }


def _longer(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The sum of two float arrays, the shorter one filled up with zeros, in float64."""
    size = max(len(total), len(part))
    return np.pad(total, (0, size - len(total))) + np.pad(part.astype(np.float64), (0, size - len(part)))


def _by_context(nats: np.ndarray, tokens: np.ndarray) -> Iterator[dict[str, float]]:
    first = 1
    while first <= len(nats):
        last = min(2 * first - 1, len(nats))
        bucket = slice(first - 1, last)
        count = tokens[bucket].sum()
        if count:
            yield {"first": first, "last": last, "tokens": int(count), "loss": float(nats[bucket].sum() / count)}
        first *= 2
