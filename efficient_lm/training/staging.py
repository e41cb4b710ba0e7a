"""Copies of a state to write from, so that the steps that follow may have the state itself.

On an accelerator, what is written is copied to the host anyway. On a CPU the arrays themselves would be written, a step
that donates them could not, and would fill memory that the system first has to find and clear, page by page. Copying
into memory that is kept from one save to the next costs a fraction of that.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST = 1 << 26
"""Bytes of a state below which finding memory costs less than compiling the copy."""


class Staging:
    """Memory of the size of a state, kept from the first copy on; none for a small state, or one on accelerators."""

    def __init__(self) -> None:
        self._held: list[jax.Array] | None = None

    def copied(self, tree: Any) -> Any:
        """A tree whose arrays no step donates. Nobody may read the last one any more.

        Args:
            tree: of `jax.Array`, the same in shapes and shardings each time.
        """
        arrays, structure = jax.tree.flatten(tree)
        if sum(array.nbytes for array in arrays) < SMALLEST or not all(map(_is_on_cpu, arrays)):
            return tree
        held, self._held = self._held, None
        self._held = _copied(held, arrays, tuple(array.sharding for array in arrays))
        return jax.tree.unflatten(structure, [_another(array) for array in self._held])


@partial(jax.jit, static_argnums=2, donate_argnums=0, keep_unused=True)
def _copied(
    held: list[jax.Array] | None, arrays: list[jax.Array], shardings: tuple[jax.sharding.Sharding, ...]
) -> list[jax.Array]:
    """Copies of arrays, in the memory of `held` if there is any."""
    return [
        jax.lax.with_sharding_constraint(jnp.copy(array), place) for array, place in zip(arrays, shardings, strict=True)
    ]


def _another(array: jax.Array) -> jax.Array:
    """The same memory as another object: what a reader keeps with that, such as its view in NumPy, ends with it."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _is_on_cpu(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.sharding.device_set)
