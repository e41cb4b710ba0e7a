"""The recurrence over chunks in plain JAX: what the kernels compute, in the same order, without their layouts."""

import jax


def chunk_states(q_in, k_out, pairs, v, whole, state, w=None):
    """See `kernels_pallas.chunk_states.chunk_states`; any dtypes, everything in that of the state."""
    dtype, count = state.dtype, pairs.shape[1]

    def chunks(value):
        """[B,T,H,X] as [N,B,H,C,X]."""
        value = value.reshape(value.shape[0], count, -1, *value.shape[2:]).transpose(1, 0, 3, 2, 4)
        return value.astype(dtype)

    def step(state, chunk):
        q_in, k_out, pairs, v, whole, w = chunk
        if w is not None:
            v = v - w @ state
        return whole[..., None] * state + k_out.swapaxes(2, 3) @ v, q_in @ state + pairs @ v

    q_in, k_out, values = (chunks(value) for value in (q_in, k_out, v))
    pairs, whole = (value.swapaxes(0, 1).astype(dtype) for value in (pairs, whole))
    w = None if w is None else chunks(w)
    state, o = jax.lax.scan(step, state, (q_in, k_out, pairs, values, whole, w))
    return o.transpose(1, 0, 3, 2, 4).reshape(v.shape).astype(v.dtype), state
