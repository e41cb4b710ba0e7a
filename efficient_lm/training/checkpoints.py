"""Checkpoints of a run: whole or absent, newest good one first.

``checkpoints/<step>/`` is an Orbax checkpoint with the items `parameters`, `optimizer` and, if one is kept, `average`
(of the parameters), a JSON record of where the run stands, and a manifest with the size and SHA-256 of every file. All
of it is written under ``unfinished/`` in the background and renamed when it is on disk, so a folder with a step's name
is whole unless something damaged it afterwards; a damaged one is named and passed over. Checkpoints that were written
before there were manifests are taken as they can be read.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, count
from operator import mul
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from efficient_lm.errors import CheckpointError, ResourceError, causes, storage_fault
from efficient_lm.models.parameters import Declaration, Parameters, is_declaration
from efficient_lm.training import manifests
from efficient_lm.training.chunks import oversized
from efficient_lm.training.fit import check_state
from efficient_lm.training.priority import give_way
from efficient_lm.training.processes import exchange, from_main, is_main
from efficient_lm.training.retention import Retention
from efficient_lm.training.staging import Staging

log = logging.getLogger(__name__)

HEADROOM = 1.2
"""Free disk space asked for before a save, as a multiple of the bytes to be written."""

AVERAGE = "average"
"""The item with the moving average of the parameters, and its name in a training state."""

UNFINISHED = "unfinished"
"""Folder of what is being written, or being deleted."""


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        retention: which ones are kept after a save; None keeps all, and leaves what an ended process did not finish.

    Raises:
        CheckpointError: nothing in the folder can be read, or it is of another architecture.
        ResourceError: the disk is full or refuses otherwise; what was saved before stays.
    """

    def __init__(self, folder: Path, retention: Retention | None = None):
        self.folder, self._retention = folder.absolute(), retention
        self._unfinished = self.folder / UNFINISHED
        self._pending: Future | None = None
        self._thread, self._staging = _thread(), Staging()
        self._verified: dict[int, tuple] = {}
        self._context = ocp.Context()
        # Floats shrink by a twelfth, and the processors that compress them are those that step.
        self._context.array.saving.use_compression = False
        if retention is not None and is_main():
            for left in [self._unfinished, *self.folder.glob("*.orbax-checkpoint-tmp*")]:
                shutil.rmtree(left, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        inside = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(found.name) for found in inside if found.name.isdigit() and found.is_dir())

    def prepare(self, items: dict[str, Any]) -> None:
        """Take the memory that saving such items needs while steps go on."""
        self._staging.copied(items)

    def save(self, step: int, items: dict[str, Any], record: dict[str, Any], going_on: bool = False) -> None:
        """Begin writing `items` (see `as_items`) and a JSON `record`; returns when the arrays may be reused.

        Args:
            going_on: whether a step follows, to which they are donated and the threads that write them give way.
        """
        self.wait()
        # Another one, for what has given way once stays behind.
        self._thread.shutdown()
        self._thread = _thread()
        if from_main(lambda: step in self.steps):
            return  # A run that is asked to go on when it is complete saves nothing twice.
        record = {**record, "shapes": _shapes(items["parameters"]), "checksums": manifests.ALGORITHM}
        try:
            self._check_space(items)
            self._unfinished.mkdir(parents=True, exist_ok=True)
            items = self._staging.copied(items) if going_on else items
            # In the thread, so that what Orbax starts has its priority.
            writing = self._thread.submit(self._begin, step, items, record, going_on).result()
        except Exception as error:
            self._fail(error)
        self._pending = self._thread.submit(self._complete, writing, step)

    @property
    def writing(self) -> bool:
        """Whether a save is going on."""
        return self._pending is not None and not self._pending.done()

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; waits for none."""
        if not self.writing:
            self.wait()

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
        """The items and record of the newest good checkpoint; None if there is no checkpoint.

        Arrays that were saved with some axes in one, or one in several, are given the shapes that are expected.

        Args:
            abstract: per item, shapes, dtypes and shardings of what is expected. Where a checkpoint has no `average`,
                none is returned.
            steps: checkpoints to choose from; all by default.
        """
        steps = from_main(lambda: self.steps) if steps is None else steps
        for step in reversed(steps):
            where = self.folder / str(step)
            wrong = from_main(lambda step=step: self._damage(step, None if self._retention else list(abstract)))
            if wrong is None:
                try:
                    metadata = ocp.checkpointables_metadata(where)
                    record = dict(metadata.custom_metadata)
                    parameters = next(abstract[name] for name in ("parameters", AVERAGE) if name in abstract)
                    _check_shapes(record["shapes"], parameters, where)
                    expected = {name: abstract[name] for name in abstract if _is_there(name, metadata.metadata)}
                    _check_chunks(where, expected)
                    saved = _as_saved(expected, parameters, record["shapes"])
                    check_state(where, metadata.metadata, saved)
                    with _reading(metadata.metadata):
                        items = ocp.load_checkpointables(where, saved) if saved else {}
                    return {name: jax.tree.map(_as_expected, items[name], expected[name]) for name in expected}, record
                except Exception as error:
                    wrong = _brief(error)
                    if isinstance(error, CheckpointError) or _is_no_damage(error):
                        raise
                    if (where / manifests.NAME).exists():
                        raise CheckpointError(f"{where}: cannot be restored, though it is whole: {wrong}") from error
            log.warning("checkpoint %s is damaged (%s); trying the one before", where, wrong)
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} can be read; move the folder to start anew"
            )
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, all of whose files are read; None if nothing is."""
        return self._damage(step)

    def set_aside_after(self, step: int, name: str = "damaged") -> None:
        """Move checkpoints later than `step` beside the folder, so that their steps can be saved again."""
        for later in [found for found in self.steps if found > step and is_main()]:
            self._set_aside(later, name)
        exchange()

    def close(self) -> None:
        """Wait for the last save and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._retention is not None and is_main():
                shutil.rmtree(self._unfinished, ignore_errors=True)

    def _begin(self, step: int, items: dict[str, Any], record: dict[str, Any], going_on: bool) -> ocp.AsyncResponse:
        if going_on:
            give_way()
        with self._context:
            return ocp.save_checkpointables_async(
                self._unfinished / str(step), items, overwrite=True, custom_metadata=record
            )

    def _complete(self, writing: ocp.AsyncResponse, step: int) -> None:
        """What follows when Orbax has written: the manifest, the name, and what is kept. In a thread."""
        writing.result()
        if is_main():
            self._publish(step)
        exchange(name="saved")

    def _publish(self, step: int) -> None:
        written, place = self._unfinished / str(step), self.folder / str(step)
        manifests.write_manifest(written)
        self._verified[step] = manifests.signature(written)
        written.rename(place)
        manifests.settle_folder(self.folder)
        if self._retention is not None:
            try:
                self._retain(self._retention)
            except (OSError, CheckpointError) as error:
                log.warning("%s: older checkpoints could not be deleted: %s", self.folder, _brief(error))
        with contextlib.suppress(OSError):
            self._unfinished.rmdir()

    def _retain(self, retention: Retention) -> None:
        """Delete what no rule keeps, but never the last good one: one of those kept was read since it last changed."""
        whole = [step for step in self.steps if self._passes(step, contents=False)]
        losses = (
            {step: read_record(self.folder / str(step)).get("val_loss") for step in whole} if retention.best else {}
        )
        kept = retention.kept(whole, {step: loss for step, loss in losses.items() if loss is not None})
        rest = [step for step in whole if step not in kept]
        if not any(self._passes(step) for step in sorted(kept, reverse=True)):
            good = next((step for step in reversed(rest) if self._passes(step)), None)
            rest = [step for step in rest if good is not None and step < good]
        for step in rest:
            # A folder that is half deleted does not keep a step's name.
            (self.folder / str(step)).rename(self._unfinished / f"{step}.deleted")
            shutil.rmtree(self._unfinished / f"{step}.deleted")

    def _passes(self, step: int, contents: bool = True) -> bool:
        """Whether a checkpoint is good; one that is damaged is named and set aside."""
        wrong = self._damage(step, contents=contents)
        if wrong is not None:
            aside = self._set_aside(step, "damaged")
            log.warning("checkpoint %s is damaged (%s); set aside as %s", self.folder / str(step), wrong, aside)
        return wrong is None

    def _damage(self, step: int, items: Iterable[str] | None = None, contents: bool = True) -> str | None:
        """What is wrong with a checkpoint. Files that are as they were when last read are not read again."""
        where = self.folder / str(step)
        try:
            if not (where / manifests.NAME).exists():
                missing = "checksums" in read_record(where)
                return f"{manifests.NAME} is missing" if missing else None
            now = manifests.signature(where)
            if self._verified.get(step) == now:
                return None
            began = time.monotonic()
            wrong = manifests.damage(where, items, contents)
            if wrong is None and contents and items is None:
                self._verified[step] = now
            log.debug("%s: verified in %.2f s", where, time.monotonic() - began)
            return wrong
        except PermissionError as error:
            raise CheckpointError(f"{error.filename or where}: permission denied") from error
        except Exception as error:
            return _brief(error)

    def _set_aside(self, step: int, name: str) -> Path:
        """Give a checkpoint a name that no other has, beside the folder."""
        names = (f"{name}_checkpoint_{step}{f'_{number}' if number else ''}" for number in count())
        aside = next(path for path in map(self.folder.parent.joinpath, names) if not path.exists())
        (self.folder / str(step)).rename(aside)
        self._verified.pop(step, None)
        return aside

    def _check_space(self, items: Any) -> None:
        needed = HEADROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ResourceError(
                f"{self.folder}: a checkpoint needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
                f"{self.newest()}"
            )

    def _fail(self, error: Exception) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        if isinstance(error, ResourceError):
            raise error
        fault = storage_fault(error)
        if fault is not None:
            raise ResourceError(f"{self.folder}: saving failed: {fault}; {self.newest()}") from error
        raise CheckpointError(f"{self.folder}: saving failed: {_brief(error)}; {self.newest()}") from error

    def newest(self) -> str:
        """For people: which one a run would go on from."""
        steps = self.steps
        return f"the newest good checkpoint is {steps[-1]}" if steps else "no checkpoint was saved yet"


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "checkpoints")


def restore_from(folder: Path, abstract: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict]:
    """Items and record of a checkpoint in a folder that is only read, the newest good one by default.

    Raises:
        CheckpointError: there is no such checkpoint, none can be read, or it is not what is expected.
    """
    checkpoints = Checkpoints(folder) if folder.is_dir() else None
    steps = checkpoints.steps if checkpoints else []
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint here")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    try:
        return checkpoints.restore(abstract, None if step is None else [step])
    finally:
        checkpoints.close()


def as_items(state: dict[str, Any]) -> dict[str, Any]:
    """A training state as the items of a checkpoint."""
    apart = {name: state[name] for name in ("parameters", AVERAGE) if name in state}
    return {**apart, "optimizer": {name: value for name, value in state.items() if name not in apart}}


def as_state(items: dict[str, Any]) -> dict[str, Any]:
    """The training state that `as_items` took apart."""
    return {**{name: value for name, value in items.items() if name != "optimizer"}, **items["optimizer"]}


def load_parameters(
    folder: Path,
    declarations: Parameters,
    step: int | None = None,
    averaged: bool = False,
    device: jax.Device | None = None,
) -> tuple[Parameters, dict]:
    """Parameters alone (float32) and the record of a checkpoint, the newest good one by default.

    Args:
        averaged: take their moving average instead.
        device: where they go; by default to the first there is.

    Raises:
        CheckpointError: as `restore_from`.
    """
    here = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])

    def abstract(declaration: Declaration) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(declaration.shape, np.float32, sharding=here)

    expected = jax.tree.map(abstract, declarations, is_leaf=is_declaration)
    name = AVERAGE if averaged else "parameters"
    items, record = restore_from(folder, {name: expected}, step)
    if name not in items:
        raise CheckpointError(
            f"averaged: {folder / str(record['step'])} holds no average of the parameters; leave it out, or train with "
            "train.average.decay=0.999"
        )
    return items[name], record


def _is_there(name: str, saved: Any) -> bool:
    """Whether an item is to be read: the average only where there is one, anything else always."""
    return name != AVERAGE or name in saved


def read_record(where: Path) -> dict[str, Any]:
    """What was noted beside the arrays of a checkpoint: its step and tokens, where it comes from, shapes."""
    return dict(ocp.checkpointables_metadata(where).custom_metadata)


def _reading(items: dict[str, Any]) -> ocp.Context:
    """A context in which few arrays of a checkpoint are on their way at once: each is held twice until it is placed.

    Args:
        items: per item, the shapes and dtypes that were saved.
    """
    sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(items)]
    context = ocp.Context()
    # More than the largest array, which is read whole where it is divided anew.
    context.memory.read_concurrent_bytes = max(2 * max(sizes), sum(sizes) // 16)
    return context


def _is_no_damage(error: BaseException) -> bool:
    """Whether a fault in reading says nothing about what was written: no memory left, or not allowed."""
    return any(
        isinstance(cause, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(cause)
        for cause in causes(error)
    )


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


def _check_chunks(where: Path, items: Iterable[str]) -> None:
    """Raises `CheckpointError` for arrays that would take more memory than they have values."""
    for item in items:
        found = oversized(where / item)
        if found is not None:
            raise CheckpointError(f"{where / item}: refused: {found}")


def _regrouped(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of the shapes has each axis of the other, or several in its place: values are in the same order."""
    ends, others = (set(accumulate(sizes, mul)) for sizes in (shape, other))
    return math.prod(shape) == math.prod(other) and (ends <= others or others <= ends)


def _as_saved(abstract: dict[str, Any], parameters: Parameters, saved: dict[str, list]) -> dict[str, Any]:
    """`abstract` with the shapes that parameters, and what an optimizer keeps for each of them, were saved with."""
    shapes = _shapes(parameters)
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
