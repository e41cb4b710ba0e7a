"""Cross entropy of a linear head, without materialised logits where that is better."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import kernel, tuning
from kernels_pallas.dispatch import choose
from kernels_pallas.linear_cross_entropy import reference, xla
from kernels_pallas.partition import COPIES, divided, home_of, manual, several
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

    Under a mesh every device computes the sums of its own tokens, with the head gathered, or with its own part of the
    vocabulary where rules of `partition.placing` divide that.

    Args:
        x: [..., D] hidden states, of tokens or of [batch, time]; their dtype is that of the matmuls, which accumulate
            in float32.
        w: [D, V] head, in any float dtype; a tied embedding is passed transposed.
        labels: int [...]. weights: [...]; 0 for tokens that do not count, whatever their label.
        z_loss: the coefficient `z_loss_sum` will be added with (arXiv 2204.02311). It changes no value: it says
            which combination's gradient is computed along with the loss. Gradients of others are right, but slower.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        chunk: tokens whose logits are alive at a time; a kernel has as many alive, and in the gradient alone. None:
            all for "xla", `xla.default_chunk` for "auto", `recomputed.default_chunk` for a kernel.
        implementation: "auto", "reference" (never in chunks), "xla" or "pallas" (kernels, on TPUs and Hopper GPUs).

    Returns:
        CrossEntropySums; `loss_sum` is without z-loss. A hit is a label whose logit is the largest.

    Raises:
        ValueError: shapes that do not fit, naming the argument, or an implementation that cannot honour the call.
    """
    _check(x, w, labels, weights, chunk)
    if several():
        return _over_devices(x, w, labels, weights, z_loss, softcap, chunk, implementation)
    x, labels, weights = x.reshape(-1, x.shape[-1]), labels.reshape(-1), weights.reshape(-1)
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


def _over_devices(x, w, labels, weights, z_loss, softcap, chunk, implementation) -> CrossEntropySums:
    """The sums of each device's own tokens, and then over the devices."""
    rows = [divided(kind, [size]) for kind, size in zip(("batch", "time"), x.shape[:-1], strict=False)]
    names, home = sum(rows, ()), home_of(("embed", "vocab"), w.shape)
    vocabulary = None if home[1] in COPIES or implementation in ("reference", "pallas") else home[1]
    tokens = labels.size

    def run(x, w, labels, weights):
        # Gathered after it is rounded; its gradient goes back to where its parts live.
        w = w.astype(x.dtype)
        for axis, name in enumerate(home):
            if name is not None and name != vocabulary:
                w = jax.lax.all_gather(w, name, axis=axis, tiled=True)
        mine = None if chunk is None else -(-chunk * labels.size // tokens)
        if vocabulary is None:
            options = {"z_loss": z_loss, "softcap": softcap, "chunk": mine, "implementation": implementation}
            sums = linear_cross_entropy(x, w, labels, weights, **options)
        else:
            flat = x.reshape(-1, x.shape[-1]), w, labels.reshape(-1), weights.astype(jnp.float32).reshape(-1)
            if mine is None and implementation == "auto":
                mine = xla.default_chunk(labels.size, w.shape[1], current().platform)
            parts = xla.sums(*flat, z_loss=z_loss, softcap=softcap, chunk=mine, over=vocabulary)
            sums = CrossEntropySums(*parts[:2], jnp.sum(weights), jax.lax.stop_gradient(parts[2]))
        return jax.lax.psum(sums, names) if names else sums

    spread = P(*(name or None for name in rows))
    return manual(run, (spread, home, spread, spread), P())(x, w, labels, weights)


def _by_kernel(target: Target, x, w, labels, weights, softcap, chunk):
    """The sums by kernels."""
    op = "linear_cross_entropy"
    held = kernel.module(op, target)
    blocks = tuning.blocks(op, target, _bucket(x, w), held.heuristic(x, w))
    blocks |= {} if chunk is None else {"chunk": chunk}
    options = {"softcap": softcap, "blocks": blocks, "simulated": target.simulated}
    return held.linear_cross_entropy(x, w, labels, weights, **options)


def _check(x, w, labels, weights, chunk) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(
            f"linear_cross_entropy: x must be [tokens, width] or [batch, time, width], not shape {x.shape}"
        )
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ValueError(f"linear_cross_entropy: w must be [{x.shape[-1]}, vocabulary], not shape {w.shape}")
    for name, value in (("labels", labels), ("weights", weights)):
        if value.shape != x.shape[:-1]:
            raise ValueError(f"linear_cross_entropy: {name} must have shape {x.shape[:-1]}, not {value.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: labels must be integers, not {labels.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, not {chunk}")
