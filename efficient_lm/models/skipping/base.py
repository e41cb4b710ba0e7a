"""The contract of a policy: it decides for every token and layer whether mixer and ffn run.

A token that a half does not run keeps its residual stream there. A policy decides from the token's own state, its
position and fixed numbers, never from other tokens: so a text that is read at once and one that is decoded token by
token go through the same layers.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.traversal import Traversal
from efficient_lm.spec import Choice

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class SkippingSpec(Choice, role="skipping"):
    """Which layers each token runs at inference. One file per kind in this folder.

    Attributes:
        prompt: whether the tokens of a prompt are decided on too; False reads it with every layer.
    """

    prompt: bool = True

    def faults(self, model: "LanguageModel") -> Iterator[tuple[str, str]]:
        """What cannot work with this model: pairs of (key, message)."""
        return iter(())

    def check(self, model: "LanguageModel") -> None:
        """Raise `ConfigError` naming what cannot work with this model."""
        for name, layer in zip(model.spec.layer_names(), model.layers, strict=True):
            if layer.depth is not None and layer.depth.passes_by:
                raise ConfigError(
                    f"skipping: '{self.kind}' and the depth rule '{layer.depth.kind}' of model.blocks.{name} would "
                    "both decide what a token runs, and do not stack; leave skipping out"
                )
            for part in ("streams", "layer_input"):
                if getattr(layer, part) is not None:
                    raise ConfigError(
                        f"skipping: tokens cannot pass by the {part} of model.blocks.{name}; leave it out"
                    )
        if model.stack.sharing:
            raise ConfigError("skipping: layers take the keys and values of others, which no token can pass by")
        for key, message in self.faults(model):
            raise ConfigError(f"skipping.{key}: {message}")

    def traversal(self, model: "LanguageModel", params: Parameters) -> Traversal:
        """What takes the decisions in one pass of a model that was checked."""
        raise TypeError(f"{type(self).__name__} does not define traversal")

    def deciding(self, model: "LanguageModel") -> np.ndarray:
        """FLOPs of deciding behind each layer, for a token that has run it: float64 ``[layers]``."""
        return np.zeros(len(model.layers))


def live(context: Context) -> jax.Array:
    """Which tokens are no padding: bool ``[batch, time]``."""
    return context.segment_ids != 0


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """The cosine between vectors `[..., width]`: float32 ``[...]``."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-30))


def count_fault(key: str, value: int, least: int, most: int, of: str) -> Iterator[tuple[str, str]]:
    """A fault where a number is not between `least` and `most`, `of` what there are so many."""
    if not least <= value <= most:
        yield key, f"{value}, but {of}; nearest that works: {min(max(value, least), most)}, valid: {least} to {most}"


def missing(what: str, kind: str, kinds: list[str]) -> str:
    """The message of a policy that needs what the model has not."""
    return f"'{kind}' needs {what}, and the model has none; {nearest(kind, [name for name in kinds if name != kind])}"
