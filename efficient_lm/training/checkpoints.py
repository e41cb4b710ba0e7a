"""Checkpoints of a run: whole or absent, newest good one first.

``checkpoints/<step>/`` is an Orbax checkpoint with the items `parameters` and `optimizer` and a JSON record of where
the run stands. Orbax writes beside the final name and renames when all is on disk, so a folder with a step's name is
whole unless something damaged it afterwards; one that cannot be read is named and passed over.
"""

import logging
import math
import shutil
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from efficient_lm.errors import CheckpointError, ResourceError, is_disk_full
from efficient_lm.models.parameters import Declaration, Parameters, is_declaration

log = logging.getLogger(__name__)

HEADROOM = 1.2
"""Free disk space asked for before a save, as a multiple of the bytes to be written."""


class Checkpoints:
    """The checkpoints in a folder, written asynchronously; the newest `keep` are kept.

    Raises:
        CheckpointError: nothing in the folder can be read, or it is of another architecture.
        ResourceError: the disk is full; what was saved before stays.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = folder
        policies = ocp.training.preservation_policies
        preserve = policies.PreserveAll() if keep is None else policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(), preservation_policy=preserve, cleanup_tmp_directories=keep is not None
        )
        self._pending: Any = None

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, items: dict[str, Any], record: dict[str, Any]) -> None:
        """Begin writing ``{"parameters", "optimizer"}`` and a JSON `record`; returns when the arrays may be reused."""
        self.wait()
        if step in self.steps:
            return  # A run that is asked to go on when it is complete saves nothing twice.
        self._check_space(items)
        record = {**record, "shapes": _shapes(items["parameters"])}
        try:
            self._pending = self._checkpointer.save_checkpointables_async(
                step, items, force=True, custom_metadata=record
            )
        except Exception as error:
            self._fail(error)

    def wait(self) -> None:
        """Return when the last save is on disk. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            self._fail(error)

    def restore(self, abstract: dict[str, Any], steps: list[int] | None = None) -> tuple[dict[str, Any], dict] | None:
        """The items and record of the newest checkpoint that can be read; None if there is no checkpoint.

        Arrays that were saved with some axes in one, or one in several, are given the shapes that are expected.

        Args:
            abstract: per item, shapes, dtypes and shardings of what is expected.
            steps: checkpoints to choose from; all by default.
        """
        steps = self.steps if steps is None else steps
        for step in reversed(steps):
            try:
                record = dict(self._checkpointer.checkpointables_metadata(step).custom_metadata)
                _check_shapes(record["shapes"], abstract["parameters"], self.folder / str(step))
                items = self._checkpointer.load_checkpointables(step, _as_saved(abstract, record["shapes"]))
                return {name: jax.tree.map(_as_expected, items[name], abstract[name]) for name in abstract}, record
            except CheckpointError:
                raise
            except Exception as error:
                log.warning(
                    "checkpoint %s is damaged (%s); trying the one before", self.folder / str(step), _brief(error)
                )
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} can be read; move the folder to start anew"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints later than `step`, which could not be read, so that their steps can be saved again."""
        for later in [found for found in self.steps if found > step]:
            aside = self.folder.parent / f"damaged_checkpoint_{later}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(later)).rename(aside)
        self._checkpointer.reload()

    def close(self) -> None:
        """Wait for the last save and stop Orbax's threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _check_space(self, items: Any) -> None:
        needed = HEADROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ResourceError(
                f"{self.folder}: a checkpoint needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
                f"{self._newest()}"
            )

    def _fail(self, error: Exception) -> None:
        if is_disk_full(error):
            raise ResourceError(f"{self.folder}: the disk is full; {self._newest()}") from error
        raise CheckpointError(f"{self.folder}: saving failed: {_brief(error)}; {self._newest()}") from error

    def _newest(self) -> str:
        return f"the newest good checkpoint is {self.steps[-1]}" if self.steps else "no checkpoint was saved yet"


def load_parameters(folder: Path, declarations: Parameters, step: int | None = None) -> tuple[Parameters, dict]:
    """Parameters alone (float32, on the default device) and the record of a checkpoint, the newest good one by default.

    Raises:
        CheckpointError: there is no such checkpoint, none can be read, or it is of another architecture.
    """
    checkpoints = Checkpoints(folder) if folder.is_dir() else None
    steps = checkpoints.steps if checkpoints else []
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint here")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(declaration: Declaration) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(declaration.shape, np.float32, sharding=here)

    expected = jax.tree.map(abstract, declarations, is_leaf=is_declaration)
    items, record = checkpoints.restore({"parameters": expected}, None if step is None else [step])
    checkpoints.close()
    return items["parameters"], record


def _shapes(parameters: Parameters) -> dict[str, list]:
    leaves = jax.tree.leaves_with_path(parameters)
    return {".".join(step.key for step in path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _check_shapes(saved: dict[str, list], expected: Parameters, where: Path) -> None:
    """Orbax would cast a dtype silently and explain a wrong tree at length."""
    wanted = _shapes(expected)
    for name in sorted(set(saved) | set(wanted)):
        found, want = saved.get(name), wanted.get(name)
        if found != want and not (found and want and found[1] == want[1] and _regrouped(found[0], want[0])):
            shown = [f"{shape[1]}{shape[0]}" if shape else "nothing" for shape in (found, want)]
            raise CheckpointError(
                f"{where}: another architecture: '{name}' is {shown[0]} in the checkpoint and {shown[1]} in the config"
            )


def _regrouped(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of the shapes has each axis of the other, or several in its place: values are in the same order."""
    ends, others = (set(accumulate(sizes, mul)) for sizes in (shape, other))
    return math.prod(shape) == math.prod(other) and (ends <= others or others <= ends)


def _as_saved(abstract: dict[str, Any], saved: dict[str, list]) -> dict[str, Any]:
    """`abstract` with the shapes that parameters, and what an optimizer keeps for each of them, were saved with."""
    shapes = _shapes(abstract["parameters"])
    changed = {name: (saved[name][0], shape) for name, (shape, _) in shapes.items() if saved[name][0] != shape}

    def before(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = ".".join(step.key for step in path if isinstance(step, jax.tree_util.DictKey))
        for parameter, (shape, now) in changed.items():
            if f".{name}".endswith(f".{parameter}") and list(leaf.shape) == now:
                # A sharding of other axes does not fit: whole on each device, until it has the axes expected.
                devices = leaf.sharding
                if isinstance(devices, jax.sharding.NamedSharding):
                    devices = jax.sharding.NamedSharding(devices.mesh, jax.sharding.PartitionSpec())
                return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=devices)
        return leaf

    return jax.tree_util.tree_map_with_path(before, abstract) if changed else abstract


def _as_expected(leaf: jax.Array, expected: jax.ShapeDtypeStruct) -> jax.Array:
    return leaf if leaf.shape == expected.shape else jax.device_put(leaf.reshape(expected.shape), expected.sharding)


def _brief(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text[:160]
