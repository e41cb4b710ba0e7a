"""Kernels on several devices: each runs the kernel on its own rows, and heads or channels where these are divided.

XLA does not know how to divide a kernel, as it does its own operations; a kernel called with divided arrays would first
gather them all on every device.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

MESH_AXES = {"batch": ("data", "fsdp", "expert"), "heads": ("tensor",)}
"""What divides each kind of axis of an operator's arrays, of the mesh axes there are."""

Axes = Sequence[str | None] | None
"""Of one array: the kind of each of its leading axes, None where it is whole; None for an array that is None."""


def divided(kind: str, sizes: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes that divide an axis of this kind, given its size in every array; () outside of a mesh.

    Inside of another `shard_map` nothing is left to divide.
    """
    free = _free()
    names = tuple(name for name in MESH_AXES[kind] if name in free)
    parts = math.prod(free[name] for name in names)
    return names if parts > 1 and all(size % parts == 0 for size in sizes) else ()


def _free() -> dict[str, int]:
    """The axes of the ambient mesh that no `shard_map` around has divided yet, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, of in types if of != AxisType.Manual}


def partitioned(
    run: Callable, arguments: Sequence, axes: Sequence[Axes], outputs: Sequence[Axes], summed: str | None = None
):
    """``run(*arguments)`` on each device's part of the arguments, under the ambient mesh if there is one.

    Where the mesh divides nothing every device runs all of it: XLA for TPUs refuses kernels outside of a `shard_map`.

    Args:
        run: takes arrays (or None) and returns a tuple of arrays; each row, and each head, is treated by itself.
        axes, outputs: for each argument and each output the kind of its leading axes, as in
            ``("batch", None, "heads")``; an axis that the mesh does not divide evenly, in any of them, stays whole.
        summed: the kind of axis that outputs are sums over.
    """
    pairs = [(value, kinds) for value, kinds in zip(arguments, axes, strict=True) if value is not None]
    names = {}
    for kind in MESH_AXES:
        sizes = [value.shape[i] for value, kinds in pairs for i, own in enumerate(kinds or ()) if own == kind]
        names[kind] = divided(kind, sizes) if sizes else ()
    free = _free()
    if math.prod(free.values()) == 1:
        return run(*arguments)

    def spec(kinds: Axes) -> P:
        return P(*(names[kind] or None if kind else None for kind in kinds or ()))

    present = [i for i, value in enumerate(arguments) if value is not None]

    def local(*values):
        given = list(arguments)
        for i, value in zip(present, values, strict=True):
            given[i] = value
        parts = run(*given)
        return jax.lax.psum(parts, names[summed]) if summed and names[summed] else parts

    over = jax.shard_map(
        local,
        in_specs=tuple(spec(axes[i]) for i in present),
        out_specs=tuple(map(spec, outputs)),
        axis_names=frozenset(free),
        check_vma=False,
    )
    return over(*(arguments[i] for i in present))
