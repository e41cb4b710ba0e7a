"""Runs as actors of Ray: on a Ray of their own on this machine, or on a cluster that is there."""

import importlib
import math
import os
import threading
import uuid
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.spec import Count, Positive, Real
from efficient_lm.sweeps.launchers.base import Handle, Job, Launcher, LauncherSpec
from efficient_lm.sweeps.launchers.remote import KILLED, PATIENCE, Ending, Running, Task
from efficient_lm.training.group import ADDRESS, COUNT, INDEX, free_address

NAMESPACE = "efficient_lm"
LOCAL = "local"
STARTS = 3
STORE_BYTES = 100 * 2**20


class RayLauncherSpec(LauncherSpec):
    """Actors of Ray. The file system with the sweep's folder and this environment is the machines' too.

    Attributes:
        concurrent: runs that Ray knows of at once, waiting or running.
        address: of a cluster, ``auto`` or ``host:port``; ``local`` starts a Ray on this machine, which ends with the
            sweep, and its runs with it.
        processes: of a run, on as many machines as there are.
        cpus, gpus: of each process.
        memory: bytes of each process, by which Ray places it; None: any.
        resources: further ones, as ``{TPU: 4}``.
    """

    kind: Literal["ray"] = "ray"
    concurrent: Count = 2
    address: Annotated[str, Field(min_length=1)] = LOCAL
    processes: Count = 1
    cpus: Positive = 1.0
    gpus: Annotated[Real, Field(ge=0)] = 0.0
    memory: Positive | None = None
    resources: dict[str, Positive] = {}

    @property
    def remote(self) -> bool:
        return self.address != LOCAL

    def build(self) -> Launcher:
        return RayLauncher(self, _started(self))

    @property
    def bundle(self) -> dict[str, float]:
        """What a process takes, in Ray's names."""
        memory = {} if self.memory is None else {"memory": self.memory}
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | memory | self.resources


def _started(spec: RayLauncherSpec) -> ModuleType:
    """Ray, connected to what the spec says."""
    # Read when Ray is imported: nothing is reported to its makers, and a Ray of this machine listens on loopback alone.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if spec.address == LOCAL:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"launcher: ray needs the package ray, which is not installed ({error}); install the extra: "
            "pip install 'efficient-lm[cluster]'"
        ) from error
    _connect(ray, spec)
    if spec.address == LOCAL:
        _check_room(spec, ray)
    return ray


def _connect(ray: ModuleType, spec: RayLauncherSpec) -> None:
    """Reach the cluster, or start a Ray; it gives up after seconds, which a busy machine may take longer than."""
    common = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if spec.address != LOCAL:
        try:
            ray.init(spec.address, **common)
        except Exception as error:
            raise ConfigError(f"launcher.address: {spec.address}: no Ray is reached there: {_words(error)}") from error
        return
    cpus = math.ceil(spec.cpus * spec.processes * spec.concurrent)
    for left in reversed(range(STARTS)):
        try:
            # Runs keep nothing in Ray's store of objects.
            ray.init(LOCAL, num_cpus=cpus, include_dashboard=False, object_store_memory=STORE_BYTES, **common)
            return
        except Exception as error:
            ray.shutdown()
            if not left:
                raise ResourceError(f"launcher: Ray does not start on this machine: {_words(error)}") from error


def _words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_room(spec: RayLauncherSpec, ray: ModuleType) -> None:
    """Raises `ConfigError` where a run would wait for ever."""
    found = ray.cluster_resources()
    for name, each in spec.bundle.items():
        if each * spec.processes > found.get(name, 0):
            ray.shutdown()
            key = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}.get(name, f"resources.{name}")
            raise ConfigError(
                f"launcher.{key}: a run takes {each * spec.processes:g}, and this machine has {found.get(name, 0):g}"
            )


class RayLauncher(Launcher):
    """Hands runs over to Ray, where they are found again by the names of their actors."""

    def __init__(self, spec: RayLauncherSpec, ray: ModuleType):
        self.spec, self._ray = spec, ray
        self._handles: list[Handle] = []

    def room(self, job: Job) -> bool:
        self._handles = [handle for handle in self._handles if handle.poll() is None]
        return len(self._handles) < self.spec.concurrent

    def submit(self, job: Job) -> Handle:
        name = f"{job.name}-{uuid.uuid4().hex[:8]}"
        task = Task.of(job, status_of(job, name))
        actor = self._ray.remote(Process)
        # Detached: runs outlive a sweep that is killed, and are found again by name.
        processes = [
            actor.options(name=f"{name}-{index}", lifetime="detached", max_concurrency=4, **place).remote(task)
            for index, place in enumerate(self._places(name))
        ]
        address = processes[0].address.remote() if len(processes) > 1 else None
        for index, process in enumerate(processes):
            process.run.remote(address, len(processes), index)
        return self._handle(job, name, processes)

    def _places(self, name: str) -> list[dict[str, Any]]:
        """Options of the actors: what each takes, and where; several get their places at once or not at all."""
        spec = self.spec
        taken = {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "memory": spec.memory, "resources": spec.resources}
        if spec.processes == 1:
            return [taken]
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._ray.util.placement_group(
            [spec.bundle] * spec.processes, strategy="SPREAD", name=name, lifetime="detached"
        )
        return [
            taken | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}
            for index in range(spec.processes)
        ]

    def attach(self, job: Job, reference: str) -> Handle | None:
        system, _, name = reference.partition(" ")
        if system != "ray":
            return None
        try:
            processes = [self._ray.get_actor(f"{name}-{index}") for index in range(self.spec.processes)]
        except ValueError:
            return None
        return self._handle(job, name, processes)

    def _handle(self, job: Job, name: str, processes: list[Any]) -> Handle:
        handle = _RayJob(self._ray, job, name, processes, patience=0 if self.spec.address == LOCAL else PATIENCE)
        self._handles.append(handle)
        return handle

    def close(self) -> None:
        self._ray.shutdown()


def status_of(job: Job, name: str) -> Path:
    """Where the exit status of a run's actors is written."""
    return (job.log.with_suffix(".ray") / f"{name.rpartition('-')[2]}.status").absolute()


class Process:
    """An actor: a process of a run. It ends with that, and so gives back what it took."""

    def __init__(self, task: Task):
        self._task = task
        self._running: Running | None = None
        self._asked, self._over = False, threading.Event()

    def begun(self) -> None:
        """Answers once the actor has its place."""

    def address(self) -> str:
        """Where process 0 may wait for the others."""
        import ray

        return free_address(ray.util.get_node_ip_address())

    def run(self, address: str | None, count: int, index: int) -> None:
        """Run to the end, of the actor too."""
        import ray

        together = {} if address is None else {ADDRESS: address, COUNT: str(count), INDEX: str(index)}
        try:
            self._running = self._task.start(index, together)
            if self._asked:
                self._running.stop()
            self._running.wait()
        finally:
            self._over.set()
            ray.actor.exit_actor()

    def ended(self) -> None:
        """Answers at the end; where the actor was lost, Ray says so instead."""
        self._over.wait()

    def stop(self) -> None:
        """Ask the run to save and stop."""
        self._asked = True
        if self._running is not None:
            self._running.stop()


class _RayJob:
    """The actors of a run."""

    def __init__(self, ray: ModuleType, job: Job, name: str, processes: list[Any], patience: float):
        self._ray, self._name, self._processes = ray, name, processes
        self._begun, self._ended = processes[0].begun.remote(), processes[0].ended.remote()
        self._ending = Ending(status_of(job, name), self._assumed, patience)
        self._asked = False
        self.reference = f"ray {name}"

    def poll(self) -> int | None:
        code = self._ending.poll()
        if code is not None and self._processes:
            self._release()
        return code

    def cancel(self) -> None:
        begun, _ = self._ray.wait([self._begun], timeout=0)
        for process in self._processes:
            if begun and not self._asked:
                process.stop.remote()
            else:
                self._ray.kill(process)
        self._asked = True

    def _assumed(self) -> int | None:
        ready, _ = self._ray.wait([self._ended], timeout=0)
        if not ready:
            return None
        try:
            self._ray.get(ready[0])
        except self._ray.exceptions.ActorUnavailableError:
            # A machine that does not answer now may do so again.
            self._ended = self._processes[0].ended.remote()
            return None
        except self._ray.exceptions.RayError:
            return KILLED
        return 1

    def _release(self) -> None:
        """Give back what Ray keeps for processes of a run that has ended."""
        if len(self._processes) > 1:
            self._ray.util.remove_placement_group(self._ray.util.get_placement_group(self._name))
        self._processes = []
