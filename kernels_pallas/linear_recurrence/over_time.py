"""The linear recurrence whose tokens are divided over devices; see `kernels_pallas.over_time`."""

import jax.numpy as jnp

from kernels_pallas.over_time import carried, reach, run_over_time

_TOKENS = ("batch", "time", "heads")


def linear_recurrence(run, log_a, x, state, segment_ids):
    """As the operator; ``run(log_a, x, segment_ids)`` computes the tokens of one device from a zero state."""

    def local(state, segment_ids, log_a, x):
        h, behind = run(log_a, x, segment_ids)
        sight = reach(segment_ids)
        decays = jnp.exp(sight.decays(log_a))
        entered, last = carried(segment_ids, behind, decays[:, -1], jnp.multiply, state)
        return h + sight.only(decays * entered[:, None]).astype(h.dtype), last

    return run_over_time(local, (log_a, x), [_TOKENS] * 2, segment_ids, state, (_TOKENS, ("batch", "heads")))
