"""The short causal convolution in front of recurrent mixers."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.parameters import ZEROS, Uniform, parameter
from kernels_pallas.short_convolution import short_convolution


class ShortConvolution(nnx.Module):
    """``y_t = f(b + Σ_j w_j x_{t-W+1+j})`` for each channel by itself; nothing crosses documents.

    Args:
        axes: logical name → size of the channels' axes.
        width: taps; the last meets the current token.
        bias: whether there is one.
        activation: f.
        implementation: which form of `kernels_pallas.short_convolution` computes it.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        width: int,
        *,
        bias: bool = False,
        activation: Activation = "silu",
        implementation: str = "auto",
    ):
        bound = width**-0.5
        self.weight = parameter({"taps": width, **axes}, Uniform(-bound, bound))
        self.bias = parameter(axes, ZEROS) if bias else None
        self.channels, self.width = tuple(axes.values()), width
        self.activation, self.implementation = ACTIVATIONS[activation], implementation

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """`x [batch, time, *channels]` → the same shape and dtype, and the inputs that the next token needs.

        Args:
            segment_ids: int32 ``[batch, time]``; None for one document in each row.
            state: ``[batch, width - 1, *channels]``, from an earlier piece.
        """
        flat = math.prod(self.channels)
        y, new = short_convolution(
            x.reshape(*x.shape[:2], flat),
            self.weight[...].astype(x.dtype).reshape(self.width, flat),
            None if self.bias is None else self.bias[...].astype(x.dtype).reshape(flat),
            segment_ids=segment_ids,
            initial_state=None if state is None else state.reshape(x.shape[0], self.width - 1, flat).astype(x.dtype),
            implementation=self.implementation,
        )
        return self.activation(y).reshape(x.shape), new.reshape(x.shape[0], self.width - 1, *self.channels)

    def empty(self, batch: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The state before any token."""
        return jnp.zeros((batch, self.width - 1, *self.channels), dtype)
