"""What mixers with a matrix of state per head share: queries read what keys and values have written."""

from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.layers.positions import NoPositionSpec, PositionSpec, RotarySpec
from efficient_lm.models.mixers.base import Cache, MixerSpec
from efficient_lm.models.mixers.recurrent import Implementation, documents, empty, entering, leaving
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Count, PerLayer
from kernels_pallas.linear_attention import linear_attention


class MatrixStateSpec(MixerSpec):
    """``S_t = D_t S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t`` per head; a kind says what q, k, v and the decay D are.

    Attributes:
        heads: how many; None has as many as a usual head goes into the width.
        key_size, value_size: values per head of queries and keys, and of values; None follows from the width.
        chunk_size, implementation: see `kernels_pallas.linear_attention`.
    """

    usual_head: ClassVar[int] = 128
    key_share: ClassVar[float] = 1.0
    value_share: ClassVar[float] = 1.0
    """All keys together, and all values, as a share of the width."""

    heads: PerLayer[Count | None] = None
    key_size: Count | None = None
    value_size: Count | None = None
    chunk_size: Count | None = None
    implementation: Implementation = "auto"

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        sizes = self.resolved(width)
        if not (sizes.key_size and sizes.value_size):
            most = int(min(self.key_share, self.value_share) * width)
            yield "heads", f"{sizes.heads} heads leave no values in width {width}; at most {most}, or set the sizes"

    def resolved(self, width: int) -> "MatrixStateSpec":
        heads = self.heads or max(1, width // self.usual_head)
        keys = self.key_size or int(self.key_share * width) // heads
        values = self.value_size or int(self.value_share * width) // heads
        return self.model_copy(update={"heads": heads, "key_size": keys, "value_size": values})

    def counted(self) -> dict[str, tuple[str, ...]]:
        return {"heads": ("heads",)}

    def state_shape(self, width: int) -> tuple[int, int, int]:
        """Heads, rows and columns of the state."""
        sizes = self.resolved(width)
        return sizes.heads, sizes.key_size, sizes.value_size

    def weights(self, width: int) -> int:
        """Weights of the maps: queries, keys, values and output, unless a kind has others."""
        sizes = self.resolved(width)
        return 2 * width * sizes.heads * (sizes.key_size + sizes.value_size)

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Maps, and the recurrent form: two products per entry of the state, and one more for its decay."""
        heads, rows, columns = self.state_shape(width)
        return 2.0 * self.weights(width) + 5 * heads * rows * columns


class MatrixState(nnx.Module):
    """The maps that all have; a kind adds how it reads them (`_read`), and how its output is normed (`_normed`)."""

    def __init__(self, spec: MatrixStateSpec, width: int, init: Initialization):
        self.spec, self.state = spec.resolved(width), spec.state_shape(width)
        embed, heads = {"embed": width}, {"heads": self.spec.heads}
        self.keys, self.values = {**heads, "state": self.spec.key_size}, {**heads, "head_dim": self.spec.value_size}
        self.query_key = Linear(embed, {"query_key": 2, **self.keys}, init=init, batch=1)
        self.value = Linear(embed, self.values, init=init)
        self.output = Linear(self.values, embed, init=init, residual=True)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """`x [batch, time, width]` → the same shape and dtype, and the cache after these tokens."""
        q, k, v, log_decay = self._read(x, context)
        y, state = linear_attention(
            q, k, v, log_decay,
            segment_ids=documents(context, cache), initial_state=entering(cache, context).get("state"),
            chunk_size=self.spec.chunk_size, implementation=self.spec.implementation,
        )  # fmt: skip
        return self.output(self._normed(y, x)), leaving(cache, context, state=state)

    def _read(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries, keys and values as `linear_attention` takes them, and the logarithm of D."""
        raise TypeError(f"{type(self).__name__} does not define _read")

    def _normed(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """What the output map reads, ``[batch, time, heads, value_size]`` in the dtype of `x`."""
        raise TypeError(f"{type(self).__name__} does not define _normed")

    def init_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """The state, float32 ``[batch, heads, rows, columns]``, of one size for any length."""
        return empty(batch, state=jnp.zeros((batch, *self.state), jnp.float32))


def gated(y: jax.Array, gate: jax.Array, activation: Activation) -> jax.Array:
    """``y * activation(gate)``, in float32, in the dtype of the gate."""
    return (y.astype(jnp.float32) * ACTIVATIONS[activation](gate.astype(jnp.float32))).astype(gate.dtype)


def turning_faults(position: PositionSpec, size: int | None) -> Iterator[tuple[str, str]]:
    """Faults of a position that queries and keys of `size` are to be turned by."""
    if not isinstance(position, (NoPositionSpec, RotarySpec)):
        yield (
            "position",
            f"'{position.kind}' adds to the logits of softmax attention, and here are none: rotary or none",
        )
    if isinstance(position, RotarySpec) and size and size % 2:
        yield "key_size", f"rotary positions turn pairs of values, and {size} is odd"
