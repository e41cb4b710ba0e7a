"""A token leaves once the head is sure of what follows it."""

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.parameters import Parameters
from efficient_lm.models.skipping.early_exit import EarlyExit, HeadExitSpec
from efficient_lm.models.traversal import State, Traversal
from efficient_lm.spec import Fraction

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class ConfidenceSpec(HeadExitSpec):
    """Confidence above a threshold (CALM, Schuster et al. 2022, section 3.5; BranchyNet, Teerapittayanon et al. 2016).

    Attributes:
        threshold: of the confidence, from 0 to 1; at 1 no token leaves.
        measure: ``probability`` of the likeliest token; ``margin`` between it and the second; ``entropy``: one less the
            entropy's share of its largest value.
    """

    kind: Literal["confidence"] = "confidence"
    threshold: Fraction = 0.9
    measure: Literal["probability", "margin", "entropy"] = "probability"

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        return _Confidence(self, model, params)


class _Confidence(EarlyExit):
    def leaves(self, seen: State, hidden: jax.Array, number: jax.Array) -> tuple[jax.Array, State]:
        return self.of_logits(MEASURES[self.spec.measure], hidden) > self.spec.threshold, seen


def _probability(logits: jax.Array) -> jax.Array:
    return jnp.exp(jnp.max(logits) - jax.nn.logsumexp(logits))


def _margin(logits: jax.Array) -> jax.Array:
    first, second = jnp.exp(jax.lax.top_k(logits, 2)[0] - jax.nn.logsumexp(logits))
    return first - second


def _certainty(logits: jax.Array) -> jax.Array:
    entropy = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits)))
    return 1 - entropy / jnp.log(float(logits.shape[-1]))


MEASURES = {"probability": _probability, "margin": _margin, "entropy": _certainty}
"""Confidence from logits, float32 ``[vocab]``, by name."""
