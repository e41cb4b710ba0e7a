"""Linear cross-entropy for TPUs: a grid over tiles of logits, which stay in fast memory while they are summed up.

In the loss the tiles of the same tokens follow each other over the whole vocabulary, and what is kept of a token, its
largest logit, the sum of exponentials below it and the label's logit, stays in fast memory between them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arguments import padded
from kernels_pallas.dispatch import unfit
from kernels_pallas.linear_cross_entropy import recomputed
from kernels_pallas.linear_cross_entropy.tokens import capped, pulled
from kernels_pallas.mxu import DTYPES, dot, interpreted, part

_LOWEST = -1e30
"""Below every logit, and finite: a difference of two of these is 0."""
_FAST_BYTES = 48 * 2**20


def obstacles(x, w) -> list[str]:
    """What of the inputs the kernels cannot honour, in words."""
    return unfit({"x": x, "w": w}, *DTYPES) + ["an empty array"] * (0 in (*x.shape, *w.shape))


CHOICES = {"tokens": (512, 1024), "vocabulary": (512, 1024, 2048), "inputs": (256, 512, 1024)}
"""Block sizes that tuning tries."""


def heuristic(x, w) -> dict[str, int]:
    """Tiles of 1024 × 1024 logits: a byte of operands, read again for each, has 512 operations, as v6e needs.

    With the operands' double buffers and the logits' intermediate values they take some 24 MiB.
    """
    tokens = min(1024, -(-x.shape[0] // 128) * 128)
    chunk = recomputed.default_chunk(x.shape[0], w.shape[1])
    return {"tokens": tokens, "vocabulary": 1024, "inputs": 1024 // x.dtype.itemsize, "chunk": chunk}


def linear_cross_entropy(x, w, labels, weights, *, softcap: float | None, blocks: dict[str, int], simulated: bool):
    """Weighted sums of cross entropy, squared log-normaliser and hits; x [N,D], w [D,V], labels and weights [N]."""
    tokens = -(-blocks["tokens"] // 16) * 16
    options = tokens, blocks["vocabulary"], part(x.shape[1], blocks["inputs"]), softcap, simulated
    parts = recomputed.parts(x.shape[0], blocks["chunk"])
    return recomputed.sums(recomputed.Kernels(_measure, _pull, options, parts), x, w, labels, weights)


def _tiled(options, body, name, x, head, of_tokens, outputs, output_spec):
    """Call a body for every tile of logits, [tokens, columns] in order of tokens, and part of the contraction.

    Args:
        of_tokens: arrays [N, ·] whose rows a tile is given whole.
    """
    tall, most, inner, _, simulated = options
    wide = part(head.shape[1], most)
    left, right = padded(x, (tall, inner)), padded(head, (inner, wide))
    rows = [padded(value, (tall, 1)) for value in of_tokens]
    return pl.pallas_call(
        body,
        out_shape=outputs(left.shape[0], right.shape[1]),
        grid=(left.shape[0] // tall, right.shape[1] // wide, left.shape[1] // inner),
        in_specs=[
            *(pl.BlockSpec((tall, value.shape[1]), lambda n, v, k: (n, 0)) for value in rows),
            pl.BlockSpec((tall, inner), lambda n, v, k: (n, k)),
            pl.BlockSpec((inner, wide), lambda n, v, k: (k, v)),
        ],
        out_specs=output_spec(tall, wide),
        scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_FAST_BYTES
        ),
        interpret=interpreted(simulated),
        name=name,
    )(*rows, left, right)


def _accumulate(x_ref, head_ref, products) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        products[...] = jnp.zeros_like(products)

    products[...] += dot(x_ref[...], head_ref[...], ((1,), (0,)))


def _columns(shape):
    """The column of the vocabulary of every logit of the tile."""
    return pl.program_id(1) * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)


def _measure(options, x, head, labels):
    """Largest logit, sum of exponentials below it and label's logit, float32 [1,N]."""

    def outputs(tokens, _):
        return [jax.ShapeDtypeStruct((tokens, 1), jnp.float32)] * 3

    def specs(tall, _):
        return [pl.BlockSpec((tall, 1), lambda n, v, k: (n, 0))] * 3

    body = functools.partial(_measure_body, options[3], head.shape[1])
    found = _tiled(options, body, "linear_cross_entropy", x, head, [labels[:, None]], outputs, specs)
    return tuple(value[: x.shape[0], 0][None] for value in found)


def _measure_body(softcap, vocabulary, labels, x_ref, head_ref, largest, total, picked, products):
    _accumulate(x_ref, head_ref, products)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        largest[...] = jnp.full_like(largest, _LOWEST)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        column = _columns(products.shape)
        logits = jnp.where(column < vocabulary, capped(products[...], softcap)[0], _LOWEST)
        new = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        below = jnp.sum(jnp.exp(logits - new), axis=1, keepdims=True)
        total[...] = total[...] * jnp.exp(largest[...] - new) + below
        picked[...] += jnp.sum(jnp.where(column == labels[...], logits, 0.0), axis=1, keepdims=True)
        largest[...] = new


def _pull(options, x, head, labels, of_tokens):
    """The gradient in the products of x and head: [N,C] in x's dtype."""

    def outputs(tokens, columns):
        return jax.ShapeDtypeStruct((tokens, columns), x.dtype)

    def spec(tall, wide):
        return pl.BlockSpec((tall, wide), lambda n, v, k: (n, v))

    body, rows = functools.partial(_pull_body, options[3]), [labels[:, None], of_tokens.T]
    dz = _tiled(options, body, "linear_cross_entropy_pull", x, head, rows, outputs, spec)
    return dz[: x.shape[0], : head.shape[1]]


def _pull_body(softcap, labels, of_tokens, x_ref, head_ref, dz_ref, products):
    _accumulate(x_ref, head_ref, products)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        normalisers, pulls, weights = (of_tokens[:, i : i + 1] for i in range(3))
        at_label = jnp.where(_columns(products.shape) == labels[...], weights, 0.0)
        dz = pulled(*capped(products[...], softcap), normalisers, pulls, at_label)
        dz_ref[...] = dz.astype(dz_ref.dtype)
