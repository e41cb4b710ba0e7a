"""The selective scan whose tokens are divided over devices; see `kernels_pallas.over_time`."""

import jax.numpy as jnp

from kernels_pallas.over_time import carried, reach, run_over_time

_TOKENS, _STATES = ("batch", "time", "heads"), ("batch", "time")


def selective_scan(run, u, dt, A, B, C, D, state, segment_ids):
    """As the operator; ``run(u, dt, A, B, C, D, segment_ids, state)`` computes the tokens of one device.

    Its tokens run twice: to add what the state in front of them changes is as much work, for channels have decays that
    differ with the place in the state.
    """

    def local(state, segment_ids, u, dt, A, B, C, D):
        _, behind = run(u, dt, A, B, C, None, segment_ids, None)
        steps = -reach(segment_ids).decays(-dt)[:, -1]
        decay = jnp.exp(steps[..., None] * A.astype(state.dtype))
        entered, last = carried(segment_ids, behind, decay, jnp.multiply, state)
        return run(u, dt, A, B, C, D, segment_ids, entered)[0], last

    axes = (_TOKENS, _TOKENS, ("heads",), _STATES, _STATES, ("heads",))
    return run_over_time(local, (u, dt, A, B, C, D), axes, segment_ids, state, (_TOKENS, ("batch", "heads")))
