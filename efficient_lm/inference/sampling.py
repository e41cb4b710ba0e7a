"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp
from pydantic import Field

from efficient_lm.spec import Count, Fraction, Real, Spec


class SamplingSpec(Spec):
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2019, nucleus sampling).
        min_p: keep tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024).
    """

    temperature: Real = Field(default=0.8, ge=0)
    top_k: Count | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None


def filter_logits(logits: jax.Array, spec: SamplingSpec) -> jax.Array:
    """Logits of the distribution that is sampled: float32 `[batch, vocab]`, -inf for what is left out.

    Temperature comes first, then top-k, top-p and min-p, each on what the one before left. The most likely token always
    stays.
    """
    logits = logits.astype(jnp.float32) / spec.temperature
    if spec.top_k is not None and spec.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, spec.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if spec.top_p is not None and spec.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = (before < spec.top_p).at[..., 0].set(True)
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if spec.min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(spec.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, keys: jax.Array, spec: SamplingSpec) -> jax.Array:
    """int32 `[batch]` from logits `[batch, vocab]` and one key per row."""
    if spec.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, spec)).astype(jnp.int32)
