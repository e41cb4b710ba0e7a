"""What linear attention with fixed rates of forgetting shares: it turns with position and is gated at its end."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from efficient_lm.models.context import Context
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.positions import PositionSpec, RotarySpec
from efficient_lm.models.mixers.matrix_state import MatrixState, MatrixStateSpec, turning_faults
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import OneOf


class FixedDecaySpec(MatrixStateSpec):
    """``S_t = λ S_{t-1} + k_t v_tᵀ`` with a constant λ per head, and ``W_o (norm(y) * g(W_g x))``.

    Attributes:
        position: how queries and keys turn.
    """

    position: OneOf[PositionSpec] = RotarySpec()

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        yield from super().faults(width)
        yield from turning_faults(self.position, self.resolved(width).key_size)

    def fixed(self) -> dict[str, str]:
        return {"heads": "each forgets at a rate that follows from its place"}

    def weights(self, width: int) -> int:
        sizes = self.resolved(width)
        return super().weights(width) + width * sizes.heads * sizes.value_size


class FixedDecay(MatrixState):
    """A kind adds its rates (`_rates`), how it reads its maps and its norm."""

    def __init__(self, spec: FixedDecaySpec, width: int, init: Initialization):
        super().__init__(spec, width, init)
        self.gate = Linear({"embed": width}, self.values, init=init)
        self.position = spec.position.build(self.spec.heads, self.spec.key_size)

    def _rates(self, context: Context) -> jax.Array:
        """``log λ``, float32 ``[heads]``."""
        raise TypeError(f"{type(self).__name__} does not define _rates")

    def log_decay(self, x: jax.Array, context: Context) -> jax.Array:
        """``log λ``, float32 ``[batch, time, heads]``."""
        return jnp.broadcast_to(self._rates(context), (*x.shape[:2], self.spec.heads))
