"""Linear cross-entropy in plain JAX for any backend: all logits at once, or chunks of tokens."""

import jax
import jax.numpy as jnp


def sums(x, w, labels, weights, *, softcap: float | None, chunk: int | None) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the cross entropy and of the squared log-normaliser; x [N,D], w [D,V], labels and weights [N]."""
    if chunk is None or chunk >= x.shape[0]:
        return _materialised(x, w, labels, weights, softcap)
    tokens = x.shape[0]
    padding = -tokens % chunk
    parts = [
        jnp.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1)).reshape(-1, chunk, *value.shape[1:])
        for value in (x, labels, weights)
    ]

    @jax.checkpoint
    def step(totals, part):
        x, labels, weights = part
        loss, squares = _materialised(x, w, labels, weights, softcap)
        return (totals[0] + loss, totals[1] + squares), None

    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.scan(step, (zero, zero), tuple(parts))[0]


def _materialised(x, w, labels, weights, softcap):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=dtype)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (normaliser - picked)), jnp.sum(weights * normaliser**2)
