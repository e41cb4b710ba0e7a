"""Learning another model's distribution of the next token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import Batch, context_of

CHUNK = 1024
"""Tokens whose logits exist at one time."""


class Teacher(NamedTuple):
    """What a model says of the next tokens of a batch.

    Attributes:
        hidden: what its head reads, ``[batch, time, width]``.
        weight: of its head, float32 ``[width, vocab]``.
        softcap: bound of its logits.
    """

    hidden: jax.Array
    weight: jax.Array
    softcap: float | None


class DistillationSums(NamedTuple):
    """float32 scalars, summed over weighted tokens: ``KL(teacher ‖ student)``, and the student's on the text itself."""

    divergence: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array


def teacher_of(
    model: LanguageModel, params: Parameters, batch: Batch, dtype: jax.typing.DTypeLike, packed: bool = True
) -> Teacher:
    """What a model says of a batch; nothing is learned through it."""
    hidden = model.hidden(params, batch["tokens"], context_of(batch, packed), dtype=dtype)[0]
    return Teacher(*lax.stop_gradient((hidden, model.head_weight(params))), model.spec.logit_softcap)


def distillation(
    hidden: jax.Array, weight: jax.Array, softcap: float | None, teacher: Teacher, batch: Batch
) -> DistillationSums:
    """How far a student is from its teacher (Hinton et al. 2015, at temperature 1).

    Args:
        hidden, weight, softcap: of the student, as of `Teacher`.
    """
    tokens = batch["targets"].size
    chunk = min(CHUNK, tokens)
    padding = -tokens % chunk
    rows = [
        jnp.pad(array.reshape(tokens, *array.shape[2:]), ((0, padding),) + ((0, 0),) * (array.ndim - 2))
        for array in (hidden, teacher.hidden, batch["targets"], batch["weights"])
    ]
    chunks = [array.reshape(-1, chunk, *array.shape[1:]) for array in rows]

    @partial(jax.checkpoint, prevent_cse=False)
    def one(weight: jax.Array, rows: list[jax.Array]) -> DistillationSums:
        mine, theirs, targets, weights = rows
        student = jax.nn.log_softmax(_logits(mine, weight, softcap))
        wanted = jax.nn.log_softmax(_logits(theirs, teacher.weight, teacher.softcap))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1)
        cross_entropy = -jnp.take_along_axis(student, targets[:, None], axis=-1)[:, 0]
        correct = (jnp.argmax(student, axis=-1) == targets).astype(jnp.float32)
        return DistillationSums(*(jnp.sum(weights * values) for values in (divergence, cross_entropy, correct)))

    def add(total: DistillationSums, rows: list[jax.Array]) -> tuple[DistillationSums, None]:
        return DistillationSums(*map(jnp.add, total, one(weight, rows))), None

    return lax.scan(add, DistillationSums(*[jnp.zeros((), jnp.float32)] * 3), chunks)[0]


def _logits(hidden: jax.Array, weight: jax.Array, softcap: float | None) -> jax.Array:
    """float32 ``[tokens, vocab]``."""
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
