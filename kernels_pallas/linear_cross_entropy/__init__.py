"""Cross entropy of a linear head, without materialised logits where that is better."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import kernel, tuning
from kernels_pallas.dispatch import choose
from kernels_pallas.linear_cross_entropy import reference, xla
from kernels_pallas.partition import partitioned
from kernels_pallas.target import Target, current


class CrossEntropySums(NamedTuple):
    """Float32 scalars, sums over tokens: divide once by `weight_sum`, after accumulation and across devices."""

    loss_sum: jax.Array
    z_loss_sum: jax.Array
    weight_sum: jax.Array
    correct_sum: jax.Array


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
    """Weighted sums over tokens of -log softmax(x w)[label], of the squared log-normaliser, and of hits.

    Args:
        x: [N, D] hidden states; their dtype is that of the matmuls, which accumulate in float32.
        w: [D, V] head, in any float dtype; a tied embedding is passed transposed.
        labels: int [N]. weights: [N]; 0 for tokens that do not count, whatever their label.
        z_loss: the coefficient `z_loss_sum` will be added with (arXiv 2204.02311). It changes no value: it says
            which combination's gradient is computed along with the loss. Gradients of others are right, but slower.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        chunk: tokens whose logits are alive at a time; a kernel has as many alive, and in the gradient alone. None:
            all for "xla", `xla.default_chunk` for "auto", `recomputed.default_chunk` for a kernel.
        implementation: "auto", "reference" (never in chunks), "xla" or "pallas" (kernels, on TPUs and Hopper GPUs;
            under a mesh each device has its own tokens).

    Returns:
        CrossEntropySums; `loss_sum` is without z-loss. A hit is a label whose logit is the largest.

    Raises:
        ValueError: shapes that do not fit, naming the argument, or an implementation that cannot honour the call.
    """
    _check(x, w, labels, weights, chunk)
    op, target, others = "linear_cross_entropy", current(), {"xla": [], "reference": [] if chunk is None else ["chunk"]}
    name = choose(op, implementation, kernel.ranked(op, target, _bucket(x, w), (x, w), **others))
    weights = weights.astype(jnp.promote_types(x.dtype, jnp.float32))
    if name == "reference":
        loss, squares, hits = reference.sums(x, w, labels, weights, softcap=softcap)
    elif name == "pallas":
        loss, squares, hits = _by_kernel(target, x, w, labels, weights, softcap, chunk)
    else:
        if chunk is None and implementation == "auto":
            chunk = xla.default_chunk(x.shape[0], w.shape[1], jax.default_backend())
        loss, squares, hits = xla.sums(x, w, labels, weights, z_loss=z_loss, softcap=softcap, chunk=chunk)
    return CrossEntropySums(loss, squares, jnp.sum(weights), jax.lax.stop_gradient(hits))


def _bucket(x, w) -> str:
    return tuning.bucket(tokens=x.shape[0], width=x.shape[1], vocabulary=w.shape[1])


def _by_kernel(target: Target, x, w, labels, weights, softcap, chunk):
    """The sums by kernels, of each device's own tokens and then over the devices, under the ambient mesh if any."""
    op = "linear_cross_entropy"
    held = kernel.module(op, target)

    def run(x, w, labels, weights):
        blocks = tuning.blocks(op, target, _bucket(x, w), held.heuristic(x, w))
        if chunk is not None:
            blocks["chunk"] = -(-chunk * x.shape[0] // tokens)
        return held.linear_cross_entropy(x, w, labels, weights, softcap=softcap, blocks=blocks, simulated=simulated)

    tokens, simulated, rows = x.shape[0], target.simulated, ("batch",)
    return partitioned(run, (x, w, labels, weights), (rows, (), rows, rows), [()] * 3, summed="batch")


def _check(x, w, labels, weights, chunk) -> None:
    if x.ndim != 2:
        raise ValueError(f"linear_cross_entropy: x must be [tokens, width], not shape {x.shape}")
    if w.ndim != 2 or w.shape[0] != x.shape[1]:
        raise ValueError(f"linear_cross_entropy: w must be [{x.shape[1]}, vocabulary], not shape {w.shape}")
    for name, value in (("labels", labels), ("weights", weights)):
        if value.shape != x.shape[:1]:
            raise ValueError(f"linear_cross_entropy: {name} must have shape {x.shape[:1]}, not {value.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: labels must be integers, not {labels.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, not {chunk}")
