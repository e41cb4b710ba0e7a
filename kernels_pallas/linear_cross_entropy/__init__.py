"""Cross entropy of a linear head, the logits materialised or not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import choose
from kernels_pallas.linear_cross_entropy import reference, xla


class CrossEntropySums(NamedTuple):
    """Float32 scalars, all sums over tokens: divide by `weight_sum` once, after accumulation and across devices."""

    loss_sum: jax.Array
    z_loss_sum: jax.Array
    weight_sum: jax.Array


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
) -> CrossEntropySums:
    """Sums of -log softmax(x w)[label] and of the squared log-normaliser.

    Args:
        x: [N, D] hidden states, in the dtype the logits' matmul is computed in. w: [D, V] head.
        labels: int [N]. weights: [N], 0 for tokens that do not count.
        z_loss: the coefficient with which `z_loss_sum` will be added; 0 lets its gradient be left out.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        chunk: tokens whose logits exist at one time.
        implementation: "auto", "reference" or "xla".
    """
    name = choose("linear_cross_entropy", implementation, {"xla": [], "reference": []})
    weights = weights.astype(jnp.promote_types(x.dtype, jnp.float32))
    if name == "reference":
        loss, squares = reference.sums(x, w, labels, weights, softcap=softcap)
    else:
        loss, squares = xla.sums(x, w, labels, weights, softcap=softcap, chunk=chunk)
    return CrossEntropySums(loss, squares, jnp.sum(weights))
