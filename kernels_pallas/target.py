"""The machine that kernels are made for: this process's, another one to compile for, or a simulated one."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: as JAX names it, such as "NVIDIA H200" or "TPU v5p"; what tuning tables are keyed by.
        hopper: an NVIDIA GPU of compute capability 9.0, the one kind of GPU that there are kernels for.
        simulated: kernels run in the interpreter, on whatever machine this is: for tests.
    """

    platform: str
    kind: str
    hopper: bool = False
    simulated: bool = False

    def obstacles(self) -> list[str]:
        """Why no Pallas kernel runs there, in words; empty if one does."""
        if self.platform == "tpu" or self.hopper:
            return []
        where = f"a {self.kind}" if self.platform == "gpu" else f"backend {self.platform}"
        return [f"{where} (Pallas kernels run on TPUs and on NVIDIA Hopper GPUs)"]


_chosen = jax.make_user_context(default_value=None)


def current() -> Target:
    """The target of what is traced now: the one chosen by a context of this module, or this process's device."""
    return _chosen.value or of_device(jax.devices()[0])


def of_device(device) -> Target:
    """The target that a device is, also one of a topology that is only compiled for."""
    capability = str(getattr(device, "compute_capability", ""))
    return Target(device.platform, device.device_kind, hopper=device.platform == "gpu" and capability == "9.0")


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """What is traced inside is made for `target`. Functions that were traced before are traced again."""
    with _chosen(target):
        yield


def simulating(platform: str):
    """What is traced inside runs kernels of "gpu" (Hopper) or "tpu" in the interpreter; for tests, and slow."""
    kinds = {"gpu": "NVIDIA H200", "tpu": "TPU v5"}
    return compiling_for(Target(platform, kinds[platform], hopper=platform == "gpu", simulated=True))
