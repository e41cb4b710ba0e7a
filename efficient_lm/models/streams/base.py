"""The contract of several residual streams beside each other.

The model has ``streams [streams, batch, time, width]`` between embedding and final norm. A block reads one stream made
of them, as ever, and what it makes of that comes into all of them.
"""

from collections.abc import Callable, Iterator

import jax
from flax import nnx

from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Choice, Count


class StreamsSpec(Choice, role="streams"):
    """Several residual streams. One file per kind in this folder; defining the class registers it.

    Attributes:
        count: how many there are.
    """

    count: Count = 4

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        return iter(())

    def build(self, width: int, init: Initialization) -> "Streams":
        """A block's own part."""
        raise TypeError(f"{type(self).__name__} does not define build")

    def build_ends(self, width: int, init: Initialization) -> "Ends":
        """What is in front of the first block and behind the last."""
        raise TypeError(f"{type(self).__name__} does not define build_ends")

    def flops_per_token(self, width: int) -> float:
        """Forward FLOPs of a block's part for one token."""
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")

    def flops_of_ends(self, width: int) -> float:
        """Forward FLOPs in front of the first block and behind the last, for one token."""
        raise TypeError(f"{type(self).__name__} does not define flops_of_ends")


class Streams(nnx.Module):
    """A block's part."""

    def read(self, streams: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Streams `[streams, batch, time, width]` → the block's own `[batch, time, width]`, and what `write` needs."""
        raise TypeError(f"{type(self).__name__} does not define read")

    def write(self, kept: jax.Array, y: jax.Array, context: Context) -> jax.Array:
        """The streams behind the block, which made `y [batch, time, width]` of its own."""
        raise TypeError(f"{type(self).__name__} does not define write")

    def added(self, streams: jax.Array, addition: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The streams with what a function of one of them adds to others."""
        raise TypeError(f"{type(self).__name__} does not define added")


class Ends(nnx.Module):
    """What is in front of the first block and behind the last."""

    def split(self, x: jax.Array) -> jax.Array:
        """Embedded tokens `[batch, time, width]` → the streams of the first block."""
        raise TypeError(f"{type(self).__name__} does not define split")

    def joined(self, streams: jax.Array) -> jax.Array:
        """The streams of the last block → `[batch, time, width]`, what the final norm reads."""
        raise TypeError(f"{type(self).__name__} does not define joined")
