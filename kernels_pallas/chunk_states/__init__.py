"""Matrix states over chunks of tokens on Hopper GPUs: what linear attention and the delta rule have in common.

Per row and head, with a state S [K, V] in front of chunk c (arXiv 2312.06635, 2406.06484):

    V'_c = V_c - W_c S_c,   O_c = Q_c S_c + P_c V'_c,   S_{c+1} = diag(whole_c) S_c + K_cᵀ V'_c

without W for linear attention. All decays and documents are in the arguments already.
"""

import functools

import jax

from kernels_pallas.chunk_states.advance_gpu import Corrects, Writes, advance
from kernels_pallas.chunk_states.read_gpu import Given, States, read


def chunk_states(
    q_in: jax.Array,
    k_out: jax.Array,
    pairs: jax.Array,
    v: jax.Array,
    whole: jax.Array,
    state: jax.Array,
    w: jax.Array | None = None,
    *,
    simulated: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and the last state of a recurrence over N = T // C chunks; differentiable in every array.

    Args:
        q_in: bfloat16 [B, T, H, K], queries times the decay from the chunk's start to the token; 0 at tokens that do
            not see the state in front of the chunk. T is a multiple of C.
        k_out: bfloat16 [B, T, H, K], keys times the decay from the token to the chunk's end; 0 at tokens that the
            state after the chunk does not hold.
        pairs: bfloat16 [B, N, H, C, C], the weight of token j's value in the output of token i of the chunk, 0 for
            j > i (its gradient is 0 there too). C is 64.
        v: bfloat16 [B, T, H, V], values; for the delta rule the wanted changes U = (I + diag(beta) A)⁻¹ diag(beta) V.
        whole: float32 [B, N, H, K], the decay over the chunk; 0 where the old state does not survive.
        state: float32 [B, H, K, V], in front of the first chunk.
        w: bfloat16 [B, T, H, K] or None, the keys under which the state is read to be corrected,
            W = (I + diag(beta) A)⁻¹ diag(beta) K_in; 0 at tokens that do not see the state in front of the chunk.
        simulated: run in the interpreter.

    K and V are multiples of 64, at most 256; with w, K is at most 128. Products are in bfloat16, with float32 sums; the
    state itself is float32, and rounded to bfloat16 where it is multiplied.

    Returns:
        o bfloat16 [B, T, H, V] and the state float32 [B, H, K, V].
    """
    return _chunk_states(simulated, q_in, k_out, pairs, v, whole, state, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_states(simulated, *arrays):
    return _forward(simulated, *arrays)[0]


def _forward(simulated, q_in, k_out, pairs, v, whole, state, w):
    writes, corrects = (Writes(k_out, v), None) if w is None else (None, Corrects(w, k_out, v, 1))
    going = advance(whole, state, writes, corrects, simulated=simulated)
    values = v if w is None else going.values
    o = read(q_in, States(going.states), Given(pairs, values), heads=v.shape[2], simulated=simulated).out
    return (o, going.last), (q_in, k_out, pairs, values, whole, w, going.states)


def _backward(simulated, residuals, cotangents):
    q_in, k_out, pairs, values, whole, w, states = residuals
    do, dstate = cotangents
    reading = functools.partial(read, heads=values.shape[2], simulated=simulated)
    going = functools.partial(advance, whole, dstate, Writes(q_in, do), reverse=True, simulated=simulated)
    if w is None:
        back = going(against=states)
        dvalues = reading(k_out, States(back.states), Given(pairs, do), reverse=True).out
        dw = None
    else:
        local = reading(None, None, Given(pairs, do), reverse=True).out
        back = going(Corrects(k_out, w, local, -1), states)
        dvalues = back.values
        dw = -reading(dvalues, States(states, turned=True)).out
    dq_in, dpairs, _ = reading(do, States(states, turned=True), emit=values)
    dk_out = reading(values, States(back.states, turned=True)).out
    return dq_in, dk_out, dpairs, dvalues, back.kept, back.last, dw


_chunk_states.defvjp(_forward, _backward)
