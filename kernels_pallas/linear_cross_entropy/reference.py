"""The definition: all logits in float32 (float64 for float64 inputs), then a log-softmax."""

import jax
import jax.numpy as jnp


def sums(x, w, labels, weights, *, softcap: float | None):
    """Weighted sums of cross entropy, squared log-normaliser and hits; x [N,D], w [D,V], labels and weights [N]."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(x.astype(dtype), w.astype(dtype), precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    normalisers = jax.nn.logsumexp(logits, axis=-1)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1, mode="clip")[:, 0]
    hits = jnp.argmax(logits, axis=-1) == labels
    return -jnp.sum(weights * picked), jnp.sum(weights * normalisers**2), jnp.sum(weights * hits)
