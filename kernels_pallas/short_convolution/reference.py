"""The definition of the short convolution: token by token, in the dtype of the sums."""

import jax
import jax.numpy as jnp

from kernels_pallas.tokens import scan_tokens


def short_convolution(x, w, state, document, live):
    """x [B,T,D], w [W,D], state [B,W-1,D], document int32 and live bool [B,T] or None -> y [B,T,D], state.

    Everything is in the dtype of the state, which holds the last W - 1 live inputs of the document, the newest last.
    """

    def step(state, token):
        x, live = token
        seen = jnp.concatenate([state, x[:, None]], axis=1)
        y = jnp.einsum("bwd,wd->bd", seen, w, precision=jax.lax.Precision.HIGHEST)
        return (seen[:, 1:] if live is None else jnp.where(live[:, None, None], seen[:, 1:], state)), y

    return scan_tokens(step, state, document, (x, live))
