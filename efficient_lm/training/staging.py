"""Copies of a state to write from, so that the steps that follow may have the state itself.

On an accelerator, what is written is copied to the host anyway. On a CPU the arrays themselves would be written, a step
that donates them could not, and would fill memory that the system first has to find and clear, page by page. Copying
into memory that is kept from one save to the next costs a fraction of that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class Staging:
    """Memory of the size of a state, kept from the first copy on; none where no array is in a CPU's memory."""

    def __init__(self) -> None:
        self._held: list[jax.Array] | None = None
        self._copy: Callable[..., list[jax.Array]] | None = None

    def copied(self, tree: Any) -> Any:
        """A tree whose arrays no step donates. Nobody may read the last one any more.

        Args:
            tree: of `jax.Array`, the same in shapes and shardings each time.
        """
        arrays, structure = jax.tree.flatten(tree)
        if not all(_is_on_cpu(array) for array in arrays):
            return tree
        held, self._held = self._held, None
        if held is None:
            self._copy = _copying([array.sharding for array in arrays])
        self._held = self._copy(held, arrays)
        return jax.tree.unflatten(structure, [_another(array) for array in self._held])


def _copying(shardings: list[jax.sharding.Sharding]) -> Callable[..., list[jax.Array]]:
    def copy(held: list[jax.Array] | None, arrays: list[jax.Array]) -> list[jax.Array]:
        return [jnp.copy(array) for array in arrays]

    return jax.jit(copy, out_shardings=shardings, donate_argnums=0, keep_unused=True)


def _another(array: jax.Array) -> jax.Array:
    """The same memory as another object: what a reader keeps with that, such as its view in NumPy, ends with it."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _is_on_cpu(array: Any) -> bool:
    return isinstance(array, jax.Array) and all(device.platform == "cpu" for device in array.sharding.device_set)
