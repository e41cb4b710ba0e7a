"""The short convolution whose tokens are divided over devices; see `kernels_pallas.over_time`."""

import jax.numpy as jnp

from kernels_pallas.over_time import carried, run_over_time
from kernels_pallas.segments import documents, silence
from kernels_pallas.short_convolution.xla import in_order, last_inputs

_TOKENS = ("batch", "time", "heads")


def short_convolution(run, x, w, bias, state, segment_ids):
    """As the operator; ``run(x, w, bias, segment_ids, state)`` computes the tokens of one device."""

    def local(state, segment_ids, x, w, bias):
        rows, kept = documents(segment_ids), state.shape[1]
        moved, number, _ = in_order(silence(rows, x), rows)
        behind = last_inputs(moved, jnp.zeros_like(state), number, rows)
        live = jnp.ones(x.shape[:2], bool) if rows is None else rows.live
        count = jnp.minimum(jnp.sum(live, axis=1, dtype=jnp.int32), kept)
        entered, last = carried(segment_ids, behind, count, _moved_on, state)
        return run(x, w, bias, segment_ids, entered)[0], last

    axes, outputs = (_TOKENS, (None, "heads"), ("heads",)), (_TOKENS, ("batch", None, "heads"))
    return run_over_time(local, (x, w, bias), axes, segment_ids, state, outputs)


def _moved_on(count, state):
    """The state [B, W - 1, D] after `count [B]` more inputs, these being zero."""
    index = count[:, None] + jnp.arange(state.shape[1], dtype=jnp.int32)
    there = jnp.take_along_axis(state, jnp.minimum(index, state.shape[1] - 1)[..., None], axis=1)
    return jnp.where((index < state.shape[1])[..., None], there, 0)
