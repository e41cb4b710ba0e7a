"""What every block is told about the tokens it sees."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

Mode = Literal["train", "prefill", "decode"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids", "layer", "key", "pregated", "layer_inputs", "shared"],
    meta_fields=["mode", "packed", "layers", "record", "gaps", "hands_on"],
)
@dataclass(frozen=True)
class Context:
    """Positions and documents of a batch of rows.

    Attributes:
        positions: int32 ``[batch, time]``, counted from 0 within each document.
        segment_ids: int32 ``[batch, time]``; equal ids are one document, 0 is padding.
        mode: ``train`` (no cache), ``prefill`` (the cache is empty on entry) or ``decode`` (it holds what came before).
        packed: whether rows may hold padding or several documents; False lets a mixer skip those masks.
        layer: index in the model of the layer that is told, from 0; the stack sets it.
        layers: how many layers the model has; the stack sets it.
        key: of this step's random numbers; None where nothing is random, as in evaluation.
        gaps: whether tokens of a document may be missing, so that how far two of them are apart is the difference of
            their positions and not of their places in the row.
        record: whether routers also observe what became of each token (arrays ``[batch, time, ...]``).
        pregated: float32 ``[batch, time, experts]``, scores of a router in front of the layers (see `models.pregate`);
            None where there is none.
        layer_inputs: what each layer reads besides the stream, ``[layers, batch, time, size]``, and in a layer its own
            ``[batch, time, size]`` (see `models.layer_embedding`); None where there is none.
        shared: keys and values that the layer takes from an earlier one (see `models.sharing`); the stack sets it.
        hands_on: whether later layers take this one's keys and values; the stack sets it.
    """

    positions: jax.Array
    segment_ids: jax.Array
    mode: Mode = field(default="train")
    packed: bool = field(default=True)
    layer: jax.Array | int = 0
    layers: int = 1
    key: jax.Array | None = None
    record: bool = False
    gaps: bool = False
    pregated: jax.Array | None = None
    layer_inputs: jax.Array | None = None
    shared: dict[str, Any] | None = None
    hands_on: bool = False

    def random(self, purpose: int) -> jax.Array | None:
        """The key of this layer's random numbers for a purpose; None where nothing is random."""
        return None if self.key is None else jax.random.fold_in(jax.random.fold_in(self.key, self.layer), purpose)

    @classmethod
    def rows(cls, batch: int, time: int) -> "Context":
        """One whole document in each row, without a cache."""
        positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
        return cls(positions, jnp.ones((batch, time), jnp.int32), packed=False)
