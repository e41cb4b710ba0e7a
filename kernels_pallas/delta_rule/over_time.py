"""The delta rule whose tokens are divided over devices; see `kernels_pallas.over_time`."""

import jax.numpy as jnp

from kernels_pallas.over_time import carried, reach, run_over_time

_TOKENS = ("batch", "time", "heads")


def delta_rule(run, q, k, v, beta, log_decay, state, segment_ids):
    """As the operator; ``run(q, k, v, beta, log_decay, segment_ids, state)`` computes the tokens of one device.

    What tokens make of a state in front of them is a matrix: what they make of the unit matrix, without values.
    """

    def local(state, segment_ids, q, k, v, beta, log_decay):
        y, behind = run(q, k, v, beta, log_decay, segment_ids, None)
        batch, heads, size, _ = state.shape
        unit = jnp.broadcast_to(jnp.eye(size, dtype=state.dtype), (batch, heads, size, size))
        nothing = jnp.zeros((*v.shape[:3], size), v.dtype)
        read, turned = run(q, k, nothing, beta, log_decay, segment_ids, unit)
        entered, last = carried(segment_ids, behind, turned, jnp.matmul, state)
        added = jnp.einsum("bthk,bhkv->bthv", read.astype(state.dtype), entered)
        return y + reach(segment_ids).only(added).astype(y.dtype), last

    axes, outputs = [_TOKENS] * 5, (_TOKENS, ("batch", "heads"))
    return run_over_time(local, (q, k, v, beta, log_decay), axes, segment_ids, state, outputs)
