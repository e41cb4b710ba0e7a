"""Operators on several devices: what divides arrays, and kernels of which each device runs its own part.

XLA does not know how to divide a kernel, as it does its own operations; a kernel called with divided arrays would first
gather them all on every device. What it can divide, it divides as it sees fit unless it is told: see `constrained` and
`whole_over_rows`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

MESH_AXES = {"batch": ("data", "fsdp", "expert"), "time": ("context",), "heads": ("tensor",)}
"""What divides each kind of axis of an operator's arrays, of the mesh axes there are."""

COPIES = ("data", "fsdp")
"""Mesh axes whose devices all need every parameter whole, if not at the same time."""

_rules = jax.make_user_context(default_value=())

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


@contextlib.contextmanager
def placing(rules: Mapping[str, str]) -> Iterator[None]:
    """Parameters that are used inside live where `rules` (logical axis → mesh axis) put them."""
    with _rules(tuple(rules.items())):
        yield


def place(axes: Sequence[str], shape: Sequence[int], rules: Mapping[str, str], sizes: Mapping[str, int]) -> P:
    """Where a parameter with these logical axes lives, on a mesh of these sizes.

    The first rule that fits takes a mesh axis, and an axis is whole that no mesh axis divides evenly. So is a vector,
    along `COPIES`: to gather it would take as long as to compute with it.
    """
    placed: dict[int, str] = {}
    vector = sum(axis != "layers" for axis in axes) < 2
    for logical, target in rules.items():
        if target not in sizes or (vector and target in COPIES):
            continue
        for index, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if axis == logical and index not in placed and target not in placed.values() and not size % sizes[target]:
                placed[index] = target
    return P(*(placed.get(index) for index in range(len(axes))))


def home_of(axes: Sequence[str], shape: Sequence[int]) -> P:
    """Where a parameter lives by the rules of `placing`, along mesh axes that no `shard_map` around has divided yet."""
    return place(axes, shape, dict(_rules.value), _free())


def holds_parameters(name: str) -> bool:
    """Whether a rule of `placing` puts parameters along this mesh axis."""
    return name in dict(_rules.value).values()


def manual(run: Callable, inputs, outputs) -> Callable:
    """`run` on each device's part of its arguments, along all mesh axes that are left to divide."""
    return jax.shard_map(run, in_specs=inputs, out_specs=outputs, axis_names=frozenset(_free()), check_vma=False)


def whole_over_rows(value: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A parameter as it is multiplied with rows: gathered over `COPIES`, divided as it was along other mesh axes."""
    apart = home_of(axes, value.shape)
    if not set(apart) & set(COPIES):
        return value
    value = jax.lax.with_sharding_constraint(value, apart)
    return jax.lax.with_sharding_constraint(value, P(*(None if name in COPIES else name for name in apart)))


def kept_apart(gradient: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A parameter's gradient, summed over devices where the parameter lives and nowhere else."""
    return jax.lax.with_sharding_constraint(gradient, home_of(axes, gradient.shape)) if several() else gradient


def constrained(value: jax.Array, kinds: "Axes") -> jax.Array:
    """`value`, divided over devices by the kinds of its leading axes; itself where the mesh divides none of them."""
    names = [divided(kind, [size]) if kind else () for kind, size in zip(kinds, value.shape, strict=False)]
    return jax.lax.with_sharding_constraint(value, P(*(name or None for name in names))) if any(names) else value


def several() -> bool:
    """Whether there are several devices that XLA divides arrays over."""
    return math.prod(_free().values()) > 1


def _free() -> dict[str, int]:
    """The axes of the ambient mesh that no `shard_map` around has divided yet, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, of in types if of != AxisType.Manual}


def partitioned(run: Callable, arguments: Sequence, axes: Sequence[Axes], outputs: Sequence[Axes]):
    """``run(*arguments)`` on each device's part of the arguments, under the ambient mesh if there is one.

    Where the mesh divides nothing every device runs all of it: XLA for TPUs refuses kernels outside of a `shard_map`.

    Args:
        run: takes arrays (or None) and returns a tuple of arrays; each row, and each head, is treated by itself.
        axes, outputs: for each argument and each output the kind of its leading axes, as in
            ``("batch", None, "heads")``; an axis that the mesh does not divide evenly, in any of them, stays whole.
    """
    pairs = [(value, kinds) for value, kinds in zip(arguments, axes, strict=True) if value is not None]
    names = {}
    for kind in MESH_AXES:
        sizes = [value.shape[i] for value, kinds in pairs for i, own in enumerate(kinds or ()) if own == kind]
        names[kind] = divided(kind, sizes) if sizes else ()
    if not several():
        return run(*arguments)

    def spec(kinds: Axes) -> P:
        return P(*(names[kind] or None if kind else None for kind in kinds or ()))

    present = [i for i, value in enumerate(arguments) if value is not None]

    def local(*values):
        given = list(arguments)
        for i, value in zip(present, values, strict=True):
            given[i] = value
        return run(*given)

    over = manual(local, tuple(spec(axes[i]) for i in present), tuple(map(spec, outputs)))
    return over(*(arguments[i] for i in present))
