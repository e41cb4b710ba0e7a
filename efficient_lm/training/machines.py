"""What a config is planned for: this machine, virtual devices of its CPU, or accelerators that are not there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from efficient_lm.errors import ConfigError
from efficient_lm.training.memory import machine_memory
from kernels_pallas import ahead
from kernels_pallas.benchmark.ceilings import Ceiling, ceiling
from kernels_pallas.target import Target, of_device

DEFAULT = {"gpu": "h200", "tpu": "v5p:2x2x1"}
"""Topologies where only the kind of chip is asked for."""

INSTALL = "pip install 'efficient-lm[ahead]' (in a checkout: make ahead)"

PREALLOCATED = 0.75
"""The part of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class Machine:
    """Devices that programs are compiled for.

    Attributes:
        devices: in the order of hosts.
        topology: which `kernels_pallas.ahead` knows; None: devices of this process.
        memory: bytes that each has; None: not known, and nothing is refused.
    """

    devices: tuple[Any, ...]
    topology: str | None = None
    memory: float | None = None

    @property
    def target(self) -> Target:
        """The kind of device."""
        return of_device(self.devices[0])

    @property
    def ceiling(self) -> Ceiling | None:
        """What one device can do, by its data sheet; None for one that has none here, as CPUs."""
        return ceiling(self.target.kind)

    def __str__(self) -> str:
        count, target = len(self.devices), self.target
        if target.platform == "cpu":
            return f"{count} CPU devices" if count > 1 else "this machine's CPU"
        name = f"TPU {self.topology.partition(':')[0]}" if self.topology and target.platform == "tpu" else target.kind
        return f"{count} × {name} ({self.topology or 'this machine'})" if count > 1 else f"one {name}"

    def alone(self) -> "Machine":
        """Its first device."""
        return Machine(self.devices[:1], self.topology, self.memory)

    def bandwidth(self, group: Sequence[int] = ()) -> tuple[float, str] | None:
        """Bytes/s that a device can send to others of a group at most, and what that takes for granted.

        Args:
            group: places among `devices`; empty: all.

        Returns:
            None where it is not known.
        """
        most = self.ceiling
        if most is None or most.link is None:
            return None
        if self.target.platform == "tpu":
            ports = _ports([device.coords for device in self.devices], self.target.kind)
            return ports * most.link, f"{ports} links of {most.link / 1e9:.0f} GB/s of each chip, all at once"
        hosts = [self.devices[place].process_index for place in group or range(len(self.devices))]
        beside = hosts.count(hosts[0])
        if beside == len(hosts):
            return most.link, f"NVLink of {most.link / 1e9:.0f} GB/s one way"
        rate = min(most.link, beside * most.network)
        return rate, f"a card of {most.network / 1e9:.0f} GB/s for each of {beside} GPUs of a host that send together"


def here(devices: Sequence[jax.Device] | None = None) -> Machine:
    """The devices of this process. Several of one CPU stand for machines elsewhere: what these have is not known."""
    devices = tuple(jax.devices() if devices is None else devices)
    if devices[0].platform == "cpu":
        return Machine(devices, None, machine_memory() if len(devices) == 1 else None)
    return Machine(devices, None, (devices[0].memory_stats() or {}).get("bytes_limit"))


def elsewhere(topology: str) -> Machine:
    """Devices that are not there, by a topology that `kernels_pallas.ahead.devices` knows.

    Raises:
        ConfigError: there is no such topology, or the compiler for it is not installed.
    """
    try:
        devices = tuple(ahead.devices(topology))
    except ahead.Missing as error:
        raise ConfigError(f"target: {error}; {INSTALL}") from error
    except ValueError as error:
        raise ConfigError(str(error).replace("topology '", "topology: '", 1)) from error
    most = ceiling(devices[0].device_kind)
    return Machine(devices, topology, most and most.memory)


def machine(target: str | None = None, topology: str | int | None = None, devices: int | None = None) -> Machine:
    """What a user asks to plan for; JAX must not have started.

    Args:
        target: "cpu", "gpu" or "tpu"; None: what the topology is of, or this machine with what JAX finds in it.
        topology: "v5p:4x4x4", "h200:8x8" (hosts, GPUs of each), or a number of H200s.
        devices: so many virtual devices of this machine's CPU.

    Raises:
        ConfigError: a topology that is none, or not of the target; a compiler that is not installed.
    """
    name = _topology(target, topology)
    if name is None:
        if target == "cpu":
            _stay_on_cpu()
        if devices is not None:
            jax.config.update("jax_num_cpu_devices", devices)
            return here(jax.devices("cpu")[:devices])
        return here()
    _stay_on_cpu()
    return elsewhere(name)


def _stay_on_cpu() -> None:
    """The process asks for no accelerator, and the compilers are found nevertheless."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def _topology(target: str | None, topology: str | int | None) -> str | None:
    """The whole name of a topology; None: this machine."""
    if topology is None:
        return DEFAULT.get(target)
    name = str(topology)
    if name.replace("x", "").isdigit() and target != "tpu":
        return f"h200:{name}"
    kind = "gpu" if name.startswith(ahead.GPUS) else "tpu" if name.startswith("v") and ":" in name else None
    if kind is None or target not in (None, kind):
        valid = {"gpu": "8 (H200s), h100:8, h200:8x8", "tpu": "v5e:2x2, v5p:2x2x1, v5p:4x4x4, v6e:4x4"}
        shown = valid[target] if target else "; ".join(valid.values())
        raise ConfigError(
            f"topology: '{name}' is none{f' of {target}s' if target else ''}; valid, for example: {shown}"
        )
    return name


def _ports(places: Sequence[Sequence[int]], kind: str) -> int:
    """Links that a chip has to others: two along an axis that closes to a ring, one along another, none along 1."""
    sizes = [len(set(along)) for along in zip(*places, strict=True)]
    rings = (lambda size: size == 16) if "lite" in kind else (lambda size: size % 4 == 0)
    return sum(0 if size == 1 else 2 if rings(size) else 1 for size in sizes)
