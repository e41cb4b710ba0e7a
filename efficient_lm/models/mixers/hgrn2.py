"""HGRN2: a gated recurrent network whose state is widened by an outer product."""

from typing import Literal

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.matrix_state import MatrixState, MatrixStateSpec
from efficient_lm.models.parameters import ZEROS, Initialization, parameter
from efficient_lm.spec import OneOf


class HGRN2Spec(MatrixStateSpec):
    """``S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ``, ``y_t = S_tᵀ q_t`` per head (Qin et al. 2024, arXiv 2404.07904,

    section 3), with ``q = silu(W_q x)``, ``f = β + (1 - β) sigmoid(W_f x)`` and ``W_o norm(y)``. A head has 128 keys.

    The bound β lets deep layers forget slowly. The paper learns one for all layers together, the cumulative softmax
    over layers of a table, which starts at ``l / L`` in layer l of L from 0. Here each layer learns its own around the
    same start, ``β = sigmoid(logit(l / L) + b)`` per channel with b from 0, so that no parameter is shared between
    blocks; layer 0 has β = 0 whatever b is.

    Attributes:
        norm: of all heads together.
    """

    kind: Literal["hgrn2"] = "hgrn2"
    norm: OneOf[NormSpec] = RMSNormSpec(epsilon=1e-5)

    @property
    def goes_by_place(self) -> bool:
        return True

    def counted(self) -> dict[str, tuple[str, ...]]:
        return super().counted() | {"state": ("key_size",)}

    def build(self, width: int, init: Initialization) -> "HGRN2":
        return HGRN2(self, width, init)


class HGRN2(MatrixState):
    def __init__(self, spec: HGRN2Spec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.bound = parameter(self.keys, ZEROS)
        self.norm = spec.norm.build(self.values)

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        pair, bound = self.query_key(x), self._bound(context)
        gate = pair[:, :, 1].astype(jnp.float32)
        k = jnp.exp(jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(-gate))
        return jax.nn.silu(pair[:, :, 0]), k.astype(x.dtype), self.value(x), _log_forget(gate, bound)

    def _bound(self, context: Context) -> jax.Array:
        """The logit of β, float32 ``[heads, key_size]``."""
        return self.bound[...] + jax.scipy.special.logit(jnp.asarray(context.layer, jnp.float32) / context.layers)

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log f``, float32 ``[batch, time, heads, key_size]``."""
        return _log_forget(self.query_key(x)[:, :, 1].astype(jnp.float32), self._bound(context))

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.norm(y)


def _log_forget(gate: jax.Array, bound: jax.Array) -> jax.Array:
    """``log(β + (1 - β) sigmoid(gate))`` of the logit of β, precise where either is next to nothing."""
    return jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(gate))
