"""Cross entropy per token and per UTF-8 byte of the text (comparable across tokenizers), and accuracy."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.evaluation.token_losses import token_losses
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec

Batches = Iterable[dict[str, np.ndarray]]
Sums = tuple[np.ndarray, ...]


def make_scorer(
    model: LanguageModel,
    dtype: jax.typing.DTypeLike = jnp.float32,
    skipping: SkippingSpec | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[Parameters, dict[str, Any]], tuple[jax.Array, ...]]:
    """A jitted ``(params, batch) -> sums``: cross entropy in nats, targets, targets that were the likeliest; and rows
    with a target, rows whose targets all were the likeliest.

    The first three are float32 ``[time]``, by the target's position in its window; the others float32 ``[1]``. Weighted
    targets alone count. With `chosen` (see `token_losses`), `targets`, `weights` and `target_positions` are those of
    the chosen places, and no rows are counted.

    The sums have the given sharding, or the compiler's choice.

    Where tokens may pass by layers, under the policy `skipping` or a depth rule, the last of the sums are tokens that
    ran each layer's mixer, then each one's ffn, and all tokens: float32 ``[2 layers + 1]``.
    """

    def score(params: Parameters, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
        weights, scores = batch["weights"], token_losses(model, params, batch, dtype, skipping)
        counted = weights > 0
        positions = batch.get("target_positions", batch["positions"])
        zeros = jnp.zeros(batch["tokens"].shape[1], jnp.float32)
        by_position = (jnp.where(counted, scores.losses, 0) * weights, weights, scores.likeliest * weights)
        rows = jnp.any(counted, axis=-1, keepdims=True) & jnp.array("chosen" not in batch)
        solved = rows & jnp.all(scores.likeliest | ~counted, axis=-1, keepdims=True)
        sums = tuple(zeros.at[positions].add(values) for values in by_position)
        sums = (*sums, *(jnp.sum(values, dtype=jnp.float32)[None] for values in (rows, solved)))
        if scores.ran is None:
            return sums
        tokens = jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32)
        return *sums, jnp.append(scores.ran.reshape(-1), tokens)

    return jax.jit(score, out_shardings=sharding)


def evaluate(
    scorer: Callable,
    params: Parameters,
    batches: Batches,
    place: Callable = lambda batch: batch,
    total: Callable[[float], float] = lambda value: value,
) -> dict[str, Any]:
    """Score windows of text (see `efficient_lm.data.packing.pack` and `efficient_lm.evaluation.windows`).

    Args:
        scorer: from `make_scorer`.
        batches: arrays `[batch, time]`, with `target_bytes`: UTF-8 bytes of each target.
        place: puts a batch on the devices.
        total: adds up what each process has counted on the host, where many have a part of each batch.

    Returns:
        `loss` (nats per token), `perplexity` per token, `bits_per_byte`, `accuracy` (targets that were the likeliest),
        `sequence_accuracy` (rows of which all were), `tokens` and `bytes` of what has a weight, `rows` with any; and
        `loss_by_context`: a list of the mean loss of tokens by how many tokens the model had read in their window
        when it predicted them, in buckets of powers of two (`first`, `last`, `tokens`, `loss`). Where tokens may pass
        by layers also `ran`: the tokens that were read, `tokens`, and how many ran the mixer and the ffn of each layer,
        `halves`, float64 ``[2, layers]``.
    """
    totals: Sums | None = None
    size = 0.0

    def add(sums: tuple[jax.Array, ...] | None) -> None:
        nonlocal totals
        if sums is not None:
            # float64 on the host: a sum over millions of tokens keeps its digits.
            before = totals or (np.zeros(0),) * len(sums)
            totals = tuple(_longer(total, np.asarray(part)) for total, part in zip(before, sums, strict=True))

    waiting = None
    for batch in batches:
        size += float(np.sum(batch["target_bytes"] * batch["weights"], dtype=np.float64))
        sums = scorer(params, place({name: value for name, value in batch.items() if name != "target_bytes"}))
        # Sums are read one batch late, so that the device is never idle while the host prepares the next.
        add(waiting)
        waiting = sums
    add(waiting)
    size = total(size)
    nats, tokens, right, rows, solved, *ran = totals or (np.zeros(0),) * 5
    count, right, rows, solved = (float(total.sum()) for total in (tokens, right, rows, solved))
    loss = nats.sum() / max(count, 1)
    return {
        "loss": float(loss),
        "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else float(loss),
        "bits_per_byte": float(nats.sum() / math.log(2) / max(size, 1)),
        "accuracy": right / max(count, 1),
        "sequence_accuracy": solved / max(rows, 1),
        "tokens": int(count),
        "bytes": int(round(size)),
        "rows": int(rows),
        "loss_by_context": list(_by_context(nats, tokens)),
    } | ({"ran": {"tokens": int(ran[0][-1]), "halves": ran[0][:-1].reshape(2, -1)}} if ran else {})


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
