"""Attention that asks for kernels decodes single tokens by the one that splits the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.mixers.attention import AttentionSpec
from efficient_lm.models.parameters import Blueprint, Initialization
from kernels_pallas import target

WIDTH, BATCH, PROMPT, TIME = 16, 2, 5, 9


@pytest.mark.quick_for("{}")
@pytest.mark.parametrize("options", [{}, {"window": 4, "kept_tokens": 1, "sink_logit": True, "softcap": 3.0}], ids=str)
def test_decoding_by_a_kernel_equals_plain_jax(options, drawn):
    sizes = {"heads": 4, "kv_heads": 2, "head_size": 8, **options}
    params = drawn(Blueprint(lambda: AttentionSpec(**sizes).build(WIDTH, Initialization())))
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    # The second row's prompt holds another document before the one that goes on.
    first = np.array([[1] * PROMPT, [1, 1, 2, 2, 2]], np.int32)
    places = np.array([range(PROMPT), [0, 1, 0, 1, 2]], np.int32)

    def run(implementation):
        spec = AttentionSpec(**sizes, implementation=implementation)
        mixer = Blueprint(lambda: spec.build(WIDTH, Initialization()))

        @jax.jit
        def step(params, x, positions, segment_ids, cache):
            context = Context(positions, segment_ids, "prefill" if x.shape[1] > 1 else "decode")
            return mixer(params)(x, context, cache)

        cache = mixer(params).init_cache(BATCH, TIME, jnp.float32)
        y, cache = step(params, x[:, :PROMPT], places, first, cache)
        rows = [y]
        for index in range(PROMPT, TIME):
            positions = places[:, -1:] + index - PROMPT + 1
            y, cache = step(params, x[:, index : index + 1], positions, first[:, -1:], cache)
            rows.append(y)
        return jnp.concatenate(rows, axis=1)

    with target.simulating("tpu"):
        got = run("pallas")
    want = run("xla")
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
