"""Linear attention whose tokens are divided over devices; see `kernels_pallas.over_time`."""

import jax.numpy as jnp

from kernels_pallas.over_time import carried, reach, run_over_time

_TOKENS = ("batch", "time", "heads")


def linear_attention(run, q, k, v, log_decay, state, segment_ids):
    """As the operator; ``run(q, k, v, log_decay, segment_ids)`` computes the tokens of one device from a zero state."""

    def local(state, segment_ids, q, k, v, log_decay):
        y, behind = run(q, k, v, log_decay, segment_ids)
        sight = reach(segment_ids)
        sums = jnp.zeros((*v.shape[:3], 1), state.dtype) if log_decay is None else sight.decays(log_decay)
        sums = sums if sums.ndim == 4 else sums[..., None]
        entered, last = carried(
            segment_ids, behind, jnp.exp(sums[:, -1]), lambda decay, state: decay[..., None] * state, state
        )
        read = jnp.repeat(q.astype(state.dtype), v.shape[2] // q.shape[2], axis=2) * jnp.exp(sums)
        return y + sight.only(jnp.einsum("bthk,bhkv->bthv", read, entered)).astype(y.dtype), last

    return run_over_time(local, (q, k, v, log_decay), [_TOKENS] * 4, segment_ids, state, (_TOKENS, ("batch", "heads")))
