"""Cross entropy of single tokens, without materialised logits.

A block of tokens meets the head block by block of the vocabulary, and the softmax's normaliser is gathered on the way
(Milakov and Gimelshein 2018, algorithm 3): what the logits of a block are needed for happens while they are in the
cache. Training's `kernels_pallas.linear_cross_entropy` returns sums, and its gradient wants whole rows of logits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.objectives.base import context_of

CPU_BLOCK = 2048, 2048
"""Tokens and entries of the vocabulary: of 49,152 entries, 1024 tokens took 0.78 s of one core in blocks of 2048 and
1.05 s in whole rows."""
ACCELERATOR_LOGITS = 1 << 27
"""Logits at a time; rows are whole, because one large matrix product is what accelerators are fast at."""

Logits = Callable[[jax.Array, jax.Array | int, int], jax.Array]


class TokenLosses(NamedTuple):
    """Of every target: its cross entropy in nats, float32, and whether no logit is larger than its own.

    Attributes:
        ran: tokens that ran the mixer, and the ffn, of each layer, float32 ``[2, layers]``; None where all did.
    """

    losses: jax.Array
    likeliest: jax.Array
    ran: jax.Array | None = None


def token_losses(
    model: LanguageModel,
    params: Parameters,
    batch: dict[str, Any],
    dtype: jax.typing.DTypeLike,
    skipping: SkippingSpec | None = None,
) -> TokenLosses:
    """Score targets where they stand, or where `chosen` says.

    Args:
        batch: `tokens`, `segment_ids`, `positions` int32 ``[batch, time]``; and `targets`, of the same shape, or with
            `chosen` of its shape: int32 ``[count]``, places in the flattened batch, so that the head is computed for
            those alone and a place may have several targets.
        dtype: of the computation; logits are float32.
        skipping: which layers each token runs; None runs all.

    Returns:
        Arrays in the shape of `targets`.
    """
    context, ran = replace(context_of(batch), record=model.stack.passes_by), None
    hidden, _, auxiliary = model.hidden(params, batch["tokens"], context, dtype=dtype, skipping=skipping)
    if skipping is not None or model.stack.passes_by:
        halves = model.stack.ran(auxiliary.observed, context.segment_ids != 0)
        ran = jnp.sum(halves, axis=(2, 3), dtype=jnp.float32)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), batch["targets"].reshape(-1)
    if "chosen" in batch:
        hidden = hidden[batch["chosen"]]
    vocabulary = model.spec.vocab_size
    tokens, entries = _blocks(vocabulary)

    def logits(hidden: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        return model.logits_from(_entries(model, params, start, size), hidden)

    scores = _by_tokens(lambda part: _score(*part, logits, vocabulary, entries), tokens, hidden, targets)
    return TokenLosses(*(array.reshape(batch["targets"].shape) for array in scores[:2]), ran)


def _entries(model: LanguageModel, params: Parameters, start: jax.Array | int, size: int) -> Parameters:
    """The parameters of the head with `size` entries of the vocabulary.

    What is cut is the parameter as it lies: XLA would transpose a whole tied embedding before it cut a transposed one.
    """
    group, name, axis = ("embedding", "tokens", 0) if model.spec.tied else ("head", "weight", 1)
    part = jax.lax.dynamic_slice_in_dim(params[group][name], start, size, axis)
    return {**params, group: {**params[group], name: part}}


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Tokens and entries of the vocabulary whose logits exist at a time."""
    if jax.default_backend() == "cpu":
        return CPU_BLOCK
    return max(1024, ACCELERATOR_LOGITS // vocabulary), vocabulary


def _score(hidden: jax.Array, targets: jax.Array, logits: Logits, vocabulary: int, entries: int) -> TokenLosses:
    """hidden ``[n, width]``, targets ``[n]``; `logits` of a block of the vocabulary are float32 ``[n, size]``."""

    def add(sums: tuple[jax.Array, ...], start: jax.Array | int, size: int) -> tuple[jax.Array, ...]:
        largest, total, picked = sums
        block = logits(hidden, start, size)
        before, largest = largest, jnp.maximum(largest, jnp.max(block, axis=-1))
        total = total * jnp.exp(before - largest) + jnp.sum(jnp.exp(block - largest[:, None]), axis=-1)
        place = targets - start
        own = jnp.take_along_axis(block, jnp.clip(place, 0, size - 1)[:, None], axis=-1)[:, 0]
        return largest, total, jnp.where((place >= 0) & (place < size), own, picked)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    sums = (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    whole = vocabulary // entries
    if whole:
        starts = entries * jnp.arange(whole, dtype=jnp.int32)
        sums, _ = jax.lax.scan(lambda sums, start: (add(sums, start, entries), None), sums, starts)
    if vocabulary % entries:
        sums = add(sums, whole * entries, vocabulary % entries)
    largest, total, picked = sums
    return TokenLosses(largest + jnp.log(total) - picked, picked >= largest)


def _by_tokens(score: Any, most: int, hidden: jax.Array, targets: jax.Array) -> TokenLosses:
    """`score` of every n-th token at a time, so that where tokens are sharded every part is on all devices."""
    count = -(-len(targets) // most)
    if count == 1:
        return score((hidden, targets))
    size = -(-len(targets) // count)

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, count * size - len(targets))] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(size, count, *array.shape[1:]).swapaxes(0, 1)

    scores = jax.lax.map(score, (split(hidden), split(targets)))
    return TokenLosses(*(array.swapaxes(0, 1).reshape(-1)[: len(targets)] for array in scores[:2]))
