"""Memory in use, as the allocator and the operating system say: asking makes no device wait."""

from pathlib import Path

import jax
import psutil

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux says how much memory this process and those beside it in a container may take."""


def machine_memory() -> int:
    """Bytes of main memory of this machine, or those that this process's container may take, if they are fewer."""
    said = [Path(path).read_text().strip() for path in LIMITS if Path(path).is_file()]
    return min([psutil.virtual_memory().total, *(int(text) for text in said if text.isdigit())])


def memory_figures() -> dict[str, int]:
    """Bytes: `host_memory_bytes`, of this process; on accelerators also of the fullest of its devices
    `device_memory_bytes`, in use, and `device_memory_peak_bytes`, the most there was in use since the start.
    """
    figures = {"host_memory_bytes": psutil.Process().memory_info().rss}
    found = [statistics for device in jax.local_devices() if (statistics := device.memory_stats())]
    for key, name in (("bytes_in_use", "device_memory_bytes"), ("peak_bytes_in_use", "device_memory_peak_bytes")):
        values = [statistics[key] for statistics in found if key in statistics]
        if values:
            figures[name] = max(values)
    return figures
