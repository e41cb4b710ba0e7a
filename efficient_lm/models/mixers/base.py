"""The contract of a sequence mixer.

``y, cache = mixer(x, context, cache)`` with `x [batch, time, width]`. A mixer lets nothing cross a document boundary,
is causal unless its spec says that it is bidirectional, gives from its cache exactly what it computes in parallel, and
keeps softmax statistics, recurrences and norms in float32. Its spec counts what it costs; its cache is what
``init_cache`` makes.
"""

from collections.abc import Hashable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
from flax import nnx

from efficient_lm.models.elastic import Elastic
from efficient_lm.models.parameters import Initialization
from efficient_lm.spec import Choice

Cache = dict[str, jax.Array]
"""What a mixer remembers of the tokens it has seen; every array has a leading batch axis."""


class Handed(NamedTuple):
    """What a mixer returns in place of its cache where the context says that it hands on (see `models.sharing`).

    Attributes:
        cache: with these tokens added; None without one.
        shared: keys and values, as a later mixer finds them in its context.
    """

    cache: Cache | None
    shared: dict[str, Any]


class MixerSpec(Elastic, Choice, role="mixer"):
    """A sequence mixer. One file per kind in this folder; defining the class registers it.

    Attributes:
        bidirectional: whether tokens see later ones; such a mixer cannot decode, nor learn to predict the next token.
        needs_every_token: whether it counts on seeing all tokens of a document, so that none may pass it by.
    """

    bidirectional: ClassVar[bool] = False
    needs_every_token: ClassVar[bool] = False

    @property
    def takes_back(self) -> bool:
        """Whether its cache has a place of its own for each token, so that the newest can be taken back by number."""
        return False

    @property
    def goes_by_place(self) -> bool:
        """Whether what it computes depends on which layer of the model it is in (see `ModelSpec.numbering`)."""
        return any(part.goes_by_place for part in self.inside().values() if isinstance(part, MixerSpec))

    @property
    def takes_keys(self) -> bool:
        """Whether it takes keys and values of an earlier layer in place of its own."""
        return False

    def with_own_keys(self) -> "MixerSpec":
        """The same with keys and values of its own."""
        return self

    def keys_alike(self, width: int) -> Hashable | None:
        """What a layer must have in common with this one to take its keys and values; None: it has none to give."""
        return None

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        """What cannot work in a model of this width: pairs of (key, message)."""
        return iter(())

    def resolved(self, width: int) -> "MixerSpec":
        """The same with every size that follows from the width filled in."""
        return self

    def held_to(self, base: Self, width: int, base_width: int) -> Self:
        """The same with constant factors by which its values stay as large as those of `base`, itself at `base_width`.

        A product of queries and keys of d values grows as d once they have learned of each other, and not as its root
        (Yang et al. 2022, definition 4.1): where they have more values than at the base, its factor falls by as much.

        Raises:
            ConfigError: it has no such factor; the message begins with the key that would help.
        """
        return self

    def build(self, width: int, init: Initialization) -> nnx.Module:
        """The module, with methods ``__call__(x, context, cache)`` and ``init_cache(batch, length, dtype)``.

        It may have ``log_decay(x, context)``, float32 ``[batch, time, ...]``, ``entropy(x, context)``, float32
        ``[batch, heads]``, and ``weights(x, context)``, float32 ``[batch, heads, time, time]``: diagnostics read them.
        """
        raise TypeError(f"{type(self).__name__} does not define build")

    def flops_per_token(self, width: int, context_length: int) -> float:
        """Forward FLOPs for one token, averaged over a sequence of `context_length` (causal: half of it on average).

        The backward pass costs twice as much.
        """
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")


def dividing(number: int, near: int) -> str:
    """For messages: the divisors of `number` that come nearest to `near`."""
    choices = sorted((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))[:3]
    return "nearest that do: " + ", ".join(str(choice) for choice in sorted(choices))
