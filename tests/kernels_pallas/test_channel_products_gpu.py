"""Decayed products per channel within chunks on Hopper GPUs, in the interpreter: against all pairs at once."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.chunk_states.channel_gpu import channel_products
from kernels_pallas.chunk_states.padding import Chunked
from kernels_pallas.segments import Documents

CHUNK = 64


def all_pairs(q, k, log_decay, documents):
    """What `channel_products` returns, in float32, from every pair's own exponent."""
    batch, time, heads, width = log_decay.shape

    def cut(value):
        value = jnp.repeat(value.astype(jnp.float32), heads // value.shape[2], axis=2)
        return value.reshape(batch, -1, CHUNK, heads, width).transpose(0, 1, 3, 2, 4)

    q, k, steps = cut(q), cut(k), cut(log_decay)
    token = np.arange(CHUNK)
    between = (token[:, None, None] >= token) & (token > token[:, None])  # of i, j: t with j < t <= i
    exponents = jnp.einsum("ijt,bnhtk->bnhijk", between.astype(np.float32), steps)
    seen = jnp.asarray(np.tri(CHUNK, dtype=bool)) & documents.same()[:, :, None]
    reads = jnp.einsum("bnhik,bnhjk,bnhijk->bnhij", q, k, jnp.exp(exponents))
    entering = jnp.exp(jnp.einsum("it,bnhtk->bnhik", np.tri(CHUNK), steps))
    leaving = jnp.exp(jnp.einsum("it,bnhtk->bnhik", 1 - np.tri(CHUNK), steps))
    entered, left = (mask[:, :, None, :, None] for mask in (documents.entered(), documents.left()))

    def joined(value, mask):
        return jnp.where(mask, value, 0).transpose(0, 1, 3, 2, 4).reshape(batch, time, heads, width)

    return joined(q * entering, entered), joined(k * leaving, left), jnp.where(seen, reads, 0)


@pytest.mark.parametrize("most", [2.0, 100.0], ids=["mild", "violent"])
def test_equals_all_pairs(results, error, without_races, most):
    generator = np.random.default_rng(0)
    normal = generator.normal
    steps = np.exp(generator.uniform(np.log(1e-3), np.log(most), size=(1, 2 * CHUNK, 2, CHUNK)))
    given = {
        "q": jnp.asarray(normal(size=(1, 2 * CHUNK, 1, CHUNK)), jnp.bfloat16),
        "k": jnp.asarray(normal(size=(1, 2 * CHUNK, 1, CHUNK)), jnp.bfloat16),
        "log_decay": jnp.asarray(-steps, jnp.float32),
    }
    number = jnp.asarray(np.searchsorted([20, 21, 90], np.arange(2 * CHUNK), side="right")[None], jnp.int32)
    documents = Chunked.of(Documents(number, number >= 0))
    kernel = functools.partial(channel_products, documents=documents, simulated=True)
    got = results(kernel, given)
    wanted = results(functools.partial(all_pairs, documents=documents), given)
    found = {name: error(got[name], wanted[name]) for name in wanted}
    assert all(value < (2e-2 if name == "dlog_decay" else 5e-3) for name, value in found.items()), found
