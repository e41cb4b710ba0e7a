"""Where arrays live: a device mesh, and a table from logical axes to mesh axes."""

import contextlib
import functools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.ffns.expert_parallel import AXIS, BATCH_AXES
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import Declaration, Parameters, map_declarations
from efficient_lm.spec import Spec
from efficient_lm.training.implementations import named_implementations
from kernels_pallas.partition import MESH_AXES, place, placing

AXES = tuple(axis for axes in MESH_AXES.values() for axis in axes)
"""The mesh axes there can be."""


class ParallelismSpec(Spec):
    """How devices are arranged and what is divided among them.

    Attributes:
        mesh: size of each mesh axis, in order; at most one is -1 and takes the devices that are left. ``data``,
            ``fsdp`` and ``expert`` divide the batch, ``context`` the tokens of a row, ``tensor`` what rules say.
        rules: logical axis of a parameter → the mesh axis that divides it, the first that fits; what is not named is
            whole everywhere.
    """

    mesh: dict[str, int] = {"data": -1}
    rules: dict[str, str] = {}

    def build(self, devices: list[jax.Device] | None = None) -> "Layout":
        """Arrange `devices` (all, by default). Raises `ConfigError` where they do not fit."""
        return Layout(self, jax.devices() if devices is None else devices)


class Layout:
    """A mesh of devices and the shardings that follow from it."""

    def __init__(self, spec: ParallelismSpec, devices: list[jax.Device]):
        for axis in spec.mesh:
            if axis not in AXES:
                raise ConfigError(f"parallelism.mesh.{axis}: no such axis; {nearest(axis, AXES)}")
        sizes = _sizes(spec.mesh, len(devices))
        for axis, target in spec.rules.items():
            if target not in sizes:
                raise ConfigError(f"parallelism.rules.{axis}: no mesh axis '{target}'; {nearest(target, sizes)}")
        arrangement = np.asarray(devices).reshape(tuple(sizes.values()))
        self.rules = spec.rules
        self.mesh = Mesh(arrangement, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        self.replicated = NamedSharding(self.mesh, P())
        self.batch_axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
        self.batch_ways = math.prod(sizes[axis] for axis in self.batch_axes)
        self.context_axes = tuple(axis for axis in MESH_AXES["time"] if axis in sizes)
        self.context_ways = math.prod(sizes[axis] for axis in self.context_axes)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which layers can ask for the mesh and the rules, as experts divided over devices do."""
        with jax.set_mesh(self.mesh), placing(self.rules):
            yield

    def check_experts(self, model: ModelSpec) -> None:
        """Refuse experts that do not divide over their mesh axis. Raises `ConfigError`."""
        ways = self.mesh.shape.get(AXIS, 1)
        if ways > 1 and self.rules.get("experts") != AXIS:
            raise ConfigError(
                f"parallelism.mesh.{AXIS}: {ways} devices, but no rule puts experts there: "
                f"add parallelism.rules.experts={AXIS}"
            )
        for name, layer in zip(model.layer_names(), model.layers(), strict=True):
            count = getattr(layer.ffn, "experts", None)
            if count is not None and count % ways:
                fitting = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
                raise ConfigError(
                    f"parallelism.mesh.{AXIS}: {ways} devices do not divide the {count} experts of "
                    f"model.blocks.{name}.ffn; valid: {fitting}"
                )

    def check_batch(self, batch_size: int, accumulate: int, key: str = "train.batch_size") -> None:
        """Refuse a batch that does not divide into micro-batches and over devices. Raises `ConfigError` with `key`."""
        pieces = self.batch_ways * accumulate
        if batch_size % pieces:
            below, above = batch_size // pieces * pieces, -(-batch_size // pieces) * pieces
            valid = " or ".join(str(size) for size in (below, above) if size)
            parts = f"{self.batch_ways} devices" + (f" × train.accumulate={accumulate}" if accumulate > 1 else "")
            raise ConfigError(f"{key}: {batch_size} does not divide over {parts}; nearest valid: {valid}")

    def check_context(self, model: ModelSpec, *lengths: int) -> None:
        """Refuse rows of lengths that do not divide over devices, and layers that cannot divide them.

        Raises:
            ConfigError: naming the key.
        """
        ways = self.context_ways
        for length in lengths:
            if not length % ways:
                continue
            below, above = length // ways * ways, -(-length // ways) * ways
            valid = " or ".join(str(size) for size in (below, above) if size)
            key = "sequence_length" if length == max(lengths) else "sequence_schedule"
            raise ConfigError(
                f"train.{key}: {length} does not divide over {ways} devices of parallelism.mesh.context; "
                f"nearest valid: {valid}"
            )
        for key, implementation in named_implementations(model).items() if ways > 1 else ():
            if implementation == "cudnn":
                raise ConfigError(
                    f"{key}: 'cudnn' returns no logsumexps, by which devices that divide the tokens "
                    "merge what they attended to; valid with parallelism.mesh.context: auto, xla, pallas; or "
                    "parallelism=fsdp"
                )

    def parameters(self, declarations: Parameters) -> Any:
        """The sharding of every parameter; see `kernels_pallas.partition.place`."""

        def sharding(declaration: Declaration) -> NamedSharding:
            return NamedSharding(self.mesh, place(declaration.axes, declaration.shape, self.rules, self.mesh.shape))

        return map_declarations(sharding, declarations)

    @cached_property
    def part(self) -> tuple[int, int]:
        """Which part of each batch this process's devices hold, and of how many: all of it if it has one process.

        Raises:
            ConfigError: the rows of a process do not lie together, or are more than another's.
        """
        spread = NamedSharding(self.mesh, P(self.batch_axes or None)).devices_indices_map((self.batch_ways,))
        held: dict[int, set[int]] = {}
        for device, (rows,) in spread.items():
            held.setdefault(device.process_index, set()).add(rows.start or 0)
        own = held[jax.process_index()]
        for rows in held.values():
            if len(rows) != len(own) or max(rows) - min(rows) >= len(own) or min(rows) % len(own):
                raise ConfigError(
                    f"parallelism.mesh: {self.mesh.shape} leaves processes with rows of a batch that are apart from "
                    f"each other; name {', '.join(self.batch_axes)} before other axes"
                )
        return min(own) // len(own), self.batch_ways // len(own)

    def batch(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put this process's part of a batch on its devices."""
        parts = self.part[1]

        def put(array: np.ndarray) -> jax.Array:
            whole = (array.shape[0] * parts, *array.shape[1:])
            return jax.make_array_from_process_local_data(self._rows(whole), array, whole)

        return {name: put(array) for name, array in arrays.items()}

    def abstract(self, tree: Any) -> Any:
        """Shapes and dtypes of arrays that are whole on every device."""
        place = functools.partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        return jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), tree)

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch of text, over all processes."""
        sharding = self._rows((rows, length))
        names = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
        return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in names.items()}

    def _rows(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of an array ``[rows, time]``, or ``[rows]``; tokens that do not divide stay together."""
        over_time = self.context_axes if len(shape) > 1 and shape[1] % self.context_ways == 0 else ()
        return NamedSharding(self.mesh, P(self.batch_axes or None, *([over_time] if over_time else [])))


def _sizes(mesh: dict[str, int], devices: int) -> dict[str, int]:
    free = [axis for axis, size in mesh.items() if size == -1]
    fixed = math.prod(size for size in mesh.values() if size != -1)
    wrong = [axis for axis, size in mesh.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise ConfigError(f"parallelism.mesh.{(wrong or free)[-1]}: sizes are at least 1, and at most one is -1")
    if devices % fixed or (not free and fixed != devices):
        shown = " × ".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ConfigError(f"parallelism.mesh: {shown} does not make up the {devices} devices there are")
    return {axis: devices // fixed if size == -1 else size for axis, size in mesh.items()}
