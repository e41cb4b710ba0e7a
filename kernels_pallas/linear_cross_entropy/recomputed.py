"""Linear cross-entropy by kernels that make logits a tile at a time, in the loss and once more in the gradient.

    loss                                      gradient, a part of the vocabulary after the other
    x [N,D] ─┐  tile of     running           x ─────────┐ tile of      dz [N,C]   dx += dz headᵀ
             ├─ logits  ──→ max, sum, label   head [D,C] ┴ logits   ──→            dw   = xᵀ dz
    head ────┘ (discarded)  per token         log-normalisers of tokens

The loss keeps of every token its log-normaliser and the label's logit. The gradient in the logits dz exists for a part
of the vocabulary, C columns: N C numbers in x's dtype, the most memory that this takes besides the results and a
float32 sum of dx. The two products with dz are XLA's own, which are as fast as such large ones get; dw of a part is
one product, complete and rounded once.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.linear_cross_entropy.tokens import Tokens, total, weight_gradient

LANES = 128
"""Parts of the vocabulary are multiples of this, unless there is one."""


class Kernels(NamedTuple):
    """The two kernels of a target.

    Attributes:
        measure: ``(options, x [N,D], head [D,V], labels [N])`` → largest logit, sum of exponentials below it and the
            label's logit of each token, float32 [S,N] of S parts of the vocabulary; a label is in one, 0 in others.
        pull: ``(options, x, head [D,C], labels [N], of_tokens [3,N])`` → dz [N,C] in x's dtype; `of_tokens` are
            float32 log-normalisers, `tokens.pulled`'s pulls, and weights in the losses.
        options: what both take first.
        parts: of the vocabulary in the gradient.
    """

    measure: Callable
    pull: Callable
    options: Hashable
    parts: int


def default_chunk(tokens: int, vocabulary: int) -> int:
    """As many tokens' logits as the gradient has alive: 2^27 logits at most, and those of an eighth of the tokens.

    256 MiB of bfloat16; materialised float32 logits take 16 times as many bytes as an eighth's.
    """
    return max(1, min(2**27 // vocabulary, tokens // 8))


def parts(tokens: int, chunk: int) -> int:
    """Into how many the gradient divides the vocabulary, to have no more logits alive than `chunk` tokens have."""
    return -(-tokens // max(1, chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(kernels: Kernels, x, w, labels, weights):
    """Weighted sums of cross entropy, squared log-normaliser and hits; x [N,D], w [D,V], labels and weights [N]."""
    return total(_measured(kernels, x, w, labels), weights)


def _forward(kernels, x, w, labels, weights):
    tokens = _measured(kernels, x, w, labels)
    return total(tokens, weights), (x, w, labels, weights, tokens)


def _backward(kernels, residuals, cotangents):
    x, w, labels, weights, tokens = residuals
    dloss, dsquares, _ = cotangents
    pulls = weights * (dloss + 2 * dsquares * tokens.normalisers)
    of_tokens = jnp.stack([tokens.normalisers, pulls, weights * dloss])
    dx, dw = _gradients(kernels, x, w, labels, of_tokens)
    return dx, dw, None, weight_gradient(tokens, dloss, dsquares).astype(weights.dtype)


sums.defvjp(_forward, _backward)


def _measured(kernels, x, w, labels) -> Tokens:
    largest, sums, picked = kernels.measure(
        kernels.options, x, w.astype(x.dtype), jnp.clip(labels, 0, w.shape[1] - 1).astype(jnp.int32)
    )
    top, picked = jnp.max(largest, axis=0), jnp.sum(picked, axis=0)
    normalisers = top + jnp.log(jnp.sum(sums * jnp.exp(largest - top), axis=0))
    return Tokens(normalisers - picked, normalisers, picked >= top)


def _gradients(kernels, x, w, labels, of_tokens):
    """dx [N,D] in x's dtype and dw [D,V] in w's, a part of the vocabulary after the other.

    The last part begins early enough to be as large as the others. What it shares with the one before it is computed
    twice, and counts in dx once.
    """
    vocabulary = w.shape[1]
    columns = min(vocabulary, -(-vocabulary // (LANES * kernels.parts)) * LANES)

    def step(carry, first):
        dx, dw = carry
        start = jnp.minimum(first, vocabulary - columns)
        part = lax.dynamic_slice_in_dim(w, start, columns, axis=1).astype(x.dtype)
        dz = kernels.pull(kernels.options, x, part, labels.astype(jnp.int32) - start, of_tokens)
        new = jnp.where(jnp.arange(columns) >= first - start, part, 0) if vocabulary % columns else part
        dx += jnp.matmul(dz, new.T, preferred_element_type=jnp.float32)
        rows = jnp.matmul(x.T, dz, preferred_element_type=jnp.float32).astype(w.dtype)
        return (dx, lax.dynamic_update_slice_in_dim(dw, rows, start, axis=1)), None

    zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, w.dtype)
    (dx, dw), _ = lax.scan(step, zeros, jnp.arange(0, vocabulary, columns, dtype=jnp.int32))
    return dx.astype(x.dtype), dw
