"""The definition of the short convolution: token by token, in the dtype of the sums."""

import jax
import jax.numpy as jnp

from kernels_pallas.segments import silence
from kernels_pallas.tokens import scan_tokens


def short_convolution(x, w, bias, state, documents):
    """x [B,T,D], w [W,D], bias [D] or None, state [B,W-1,D], documents or None.

    Returns y [B,T,D] and the state: the last W - 1 live inputs of the document, the newest last.
    """
    w, bias = (None if value is None else value.astype(state.dtype) for value in (w, bias))

    def step(state, token):
        x, live = token
        seen = jnp.concatenate([state, x[:, None].astype(state.dtype)], axis=1)
        y = jnp.einsum("bwd,wd->bd", seen, w, precision=jax.lax.Precision.HIGHEST)
        after = seen[:, 1:] if live is None else jnp.where(live[:, None, None], seen[:, 1:], state)
        return after, y if bias is None else y + bias

    live = None if documents is None else documents.live
    return scan_tokens(step, state, documents, (silence(documents, x), live))
