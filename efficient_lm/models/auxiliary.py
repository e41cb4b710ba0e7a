"""What layers return besides their result: losses of their own, and what was seen in passing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Auxiliary(NamedTuple):
    """Returned by every channel mixer, depth rule and block.

    Attributes:
        losses: name → float32 scalar per token, already weighted by the spec; summed over layers and added to the
            objective.
        observed: name → float32 of one layer. A scalar is a mean over tokens, logged as its mean over layers; an array
            is a count, summed over micro-batches and kept apart for each layer (see `FFNSpec.corrected`).
        shared: keys and values that later layers take (see `models.sharing`); empty where none does.
    """

    losses: dict[str, jax.Array] = {}  # noqa: RUF012  (never written to)
    observed: dict[str, Any] = {}  # noqa: RUF012
    shared: dict[str, Any] = {}  # noqa: RUF012

    def merged(self, other: "Auxiliary") -> "Auxiliary":
        """Of two parts of one layer."""
        return Auxiliary(added(self.losses, other.losses), self.observed | other.observed, self.shared | other.shared)


def added(left: dict[str, jax.Array], right: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums by name."""
    return left | {name: left[name] + value if name in left else value for name, value in right.items()}


def means(observed: dict[str, dict[str, dict[str, jax.Array]]]) -> dict[str, jax.Array]:
    """The scalars that layers observed, each averaged over the layers that have it.

    `observed` is what `Stack` returns: segment → place in its period → name → values stacked over repeats.
    """
    found: dict[str, list[jax.Array]] = {}
    for layer in layers(observed):
        for name, values in layer.items():
            if values.ndim == 1:
                found.setdefault(name, []).append(values)
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in found.items()}


def layers(observed: dict[str, dict[str, Any]]) -> list[dict[str, jax.Array]]:
    """What each place of each segment observed."""
    return [layer for segment in observed.values() for layer in segment.values()]


def counts(observed: dict[str, dict[str, dict[str, jax.Array]]]) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """Without the scalars."""
    return {
        segment: {
            place: {name: values for name, values in layer.items() if values.ndim > 1} for place, layer in found.items()
        }
        for segment, found in observed.items()
    }
