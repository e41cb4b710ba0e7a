"""What goes along with the tokens through the layers: it sees what each layer does, and may say which halves run.

Training with early exits collects streams this way; inference decides this way what each token runs.
"""

from typing import Any, ClassVar, NamedTuple

import jax

from efficient_lm.models.context import Context

State = Any
"""A pytree that is carried from layer to layer; its structure, shapes and dtypes stay."""


class Runs(NamedTuple):
    """Which tokens run the halves of a block: bool ``[batch, time]`` each."""

    mixer: jax.Array
    ffn: jax.Array


class Passage(NamedTuple):
    """The residual stream on its way past a layer, ``[batch, time, width]`` each.

    Attributes:
        before, after: in front of the block and behind it.
        between: as it would be behind the block without the ffn; None where every half runs.
    """

    before: jax.Array
    between: jax.Array | None
    after: jax.Array


class Traversal:
    """One pass through the layers. The stack calls `start`, then `choose` and `watch` for each layer in order.

    Attributes:
        keeps_caches: whether mixers that a token does not run still remember it, from the stream that goes past them:
            so later tokens may run deeper than those before them.
        tables: a pytree of arrays with a leading axis of layers; each layer is given its own part.
    """

    keeps_caches: ClassVar[bool] = True
    tables: Any = ()

    def start(self, x: jax.Array) -> State:
        """The state in front of the first layer, of the embedded tokens `x [batch, time, width]`."""
        return ()

    def choose(self, state: State, table: Any, context: Context) -> Runs | None:
        """Which tokens run this layer's halves; None, in every layer alike: all of them."""
        return None

    def watch(self, state: State, table: Any, passage: Passage, runs: Runs | None, context: Context) -> State:
        """The state behind a layer."""
        return state

    def result(self, state: State, hidden: jax.Array) -> jax.Array:
        """What the head reads, where `hidden [batch, time, width]` is the normed stream behind the last layer."""
        return hidden
