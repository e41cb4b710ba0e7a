"""Whether a run fits in memory, by what the compiler says of its step."""

import jax
import psutil

from efficient_lm.config import RunConfig
from efficient_lm.errors import ResourceError
from efficient_lm.sweeps.sizing import with_vocabulary_known
from efficient_lm.training.accounting import plan

HELD = ("parameters", "gradients", "optimizer", "activations")
"""What a step holds, as `training.accounting.plan` names it."""


def needed_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes that a training step holds on each device, by part: its program is compiled, and no array is made.

    Raises:
        ConfigError: the config does not work on this machine's devices.
    """
    held = plan(with_vocabulary_known(config))["bytes"]
    return {part: held[part] for part in HELD}


def available_bytes() -> int:
    """Of one device what an allocator may take, or on a CPU what the machine has left, divided among its devices."""
    device = jax.devices()[0]
    limits = device.memory_stats() or {}
    return limits.get("bytes_limit") or psutil.virtual_memory().available // jax.local_device_count()


def check_memory(config: RunConfig, available: int | None = None, name: str = "") -> dict[str, int]:
    """What a run needs (see `needed_bytes`).

    Args:
        available: bytes of each device; None asks this machine.
        name: of the run, for the message.

    Raises:
        ResourceError: it is more than there is; with the numbers, and what to change.
        ConfigError: as `needed_bytes`.
    """
    needed, available = needed_bytes(config), available_bytes() if available is None else available
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{part} {_gigabytes(count)}" for part, count in needed.items())
        lower = "lower train.batch_size or raise train.accumulate"
        most = max(needed, key=needed.__getitem__)
        advice = lower if most == "activations" else "choose a smaller model, or parallelism=fsdp on more devices"
        raise ResourceError(
            f"{name + ': ' if name else ''}a step needs {_gigabytes(total)} of each device, and there are "
            f"{_gigabytes(available)}: {parts}; {advice}"
        )
    return needed


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"
