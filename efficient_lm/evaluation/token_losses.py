"""Cross entropy of single tokens, without materialised logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import context_of
from kernels_pallas.linear_cross_entropy.xla import default_chunk


class TokenLosses(NamedTuple):
    """Of every target: its cross entropy in nats, float32, and whether its logit is the largest."""

    losses: jax.Array
    likeliest: jax.Array


def token_losses(
    model: LanguageModel, params: Parameters, batch: dict[str, Any], dtype: jax.typing.DTypeLike
) -> TokenLosses:
    """Score targets where they stand, or where `chosen` says.

    Args:
        batch: `tokens`, `segment_ids`, `positions` int32 ``[batch, time]``; and `targets`, of the same shape, or with
            `chosen` of its shape: int32 ``[count]``, places in the flattened batch, so that the head is computed for
            those alone and a place may have several targets.
        dtype: of the computation; logits are float32.

    Returns:
        Arrays in the shape of `targets`.
    """
    hidden, _, _ = model.hidden(params, batch["tokens"], context_of(batch), dtype=dtype)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), batch["targets"].reshape(-1)
    if "chosen" in batch:
        hidden = hidden[batch["chosen"]]

    def score(part: tuple[jax.Array, jax.Array]) -> TokenLosses:
        logits = model.logits_from(params, part[0])
        largest = jnp.max(logits, axis=-1)
        normaliser = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1))
        picked = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
        return TokenLosses(normaliser - picked, picked >= largest)

    chunk = default_chunk(len(targets), model.spec.vocab_size, jax.default_backend())
    scores = _in_chunks(score, chunk, hidden, targets)
    return TokenLosses(*(array.reshape(batch["targets"].shape) for array in scores))


def _in_chunks(score: Any, chunk: int, hidden: jax.Array, targets: jax.Array) -> TokenLosses:
    """`score` of every n-th token at a time, so that where tokens are sharded every chunk is on all devices."""
    count = -(-len(targets) // chunk)
    if count == 1:
        return score((hidden, targets))

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, count * chunk - len(targets))] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunk, count, *array.shape[1:]).swapaxes(0, 1)

    scores = jax.lax.map(score, (split(hidden), split(targets)))
    return TokenLosses(*(array.swapaxes(0, 1).reshape(-1)[: len(targets)] for array in scores))
