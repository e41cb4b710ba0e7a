"""Where arrays live: a device mesh, and a table from logical axes to mesh axes."""

import math
from contextlib import AbstractContextManager
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


class ParallelismSpec(Spec):
    """How devices are arranged and what is divided among them.

    Attributes:
        mesh: size of each mesh axis, in order; at most one is -1 and takes the devices that are left.
        rules: logical axis of a parameter → the mesh axis that divides it; what is not named is whole everywhere.
    """

    mesh: dict[str, int] = {"data": -1}
    rules: dict[str, str] = {}

    def build(self, devices: list[jax.Device] | None = None) -> "Layout":
        """Arrange `devices` (all, by default). Raises `ConfigError` where they do not fit."""
        return Layout(self, jax.devices() if devices is None else devices)


class Layout:
    """A mesh of devices and the shardings that follow from it."""

    def __init__(self, spec: ParallelismSpec, devices: list[jax.Device]):
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

    def active(self) -> AbstractContextManager:
        """A context in which layers can ask for the mesh, as experts divided over devices do."""
        return jax.set_mesh(self.mesh)

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

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Refuse a batch that does not divide into micro-batches and over devices. Raises `ConfigError`."""
        pieces = self.batch_ways * accumulate
        if batch_size % pieces:
            below, above = batch_size // pieces * pieces, -(-batch_size // pieces) * pieces
            valid = " or ".join(str(size) for size in (below, above) if size)
            parts = f"{self.batch_ways} devices" + (f" × train.accumulate={accumulate}" if accumulate > 1 else "")
            raise ConfigError(f"train.batch_size: {batch_size} does not divide over {parts}; nearest valid: {valid}")

    def parameters(self, declarations: Parameters) -> Any:
        """The sharding of every parameter."""
        return map_declarations(lambda declaration: NamedSharding(self.mesh, self._spec(declaration)), declarations)

    def _spec(self, declaration: Declaration) -> P:
        """An axis that its mesh axis does not divide evenly, or a mesh axis already used, leaves the axis whole."""
        placed: list[str | None] = []
        for axis, size in zip(declaration.axes, declaration.shape, strict=True):
            target = self.rules.get(axis)
            fits = target is not None and target not in placed and size % self.mesh.shape[target] == 0
            placed.append(target if fits else None)
        return P(*placed)

    def batch(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put this process's rows of a batch on its devices."""
        sharding = NamedSharding(self.mesh, P(self.batch_axes or None))
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch of text, over all processes."""
        sharding = NamedSharding(self.mesh, P(self.batch_axes or None))
        names = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
        return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in names.items()}


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
