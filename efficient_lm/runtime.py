"""The process around a run: where compiled programs are kept, how messages look, what it runs on. Import before jax."""

import datetime
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import jax


def cache_root() -> Path:
    """Folder of what can be made again: ``EFFICIENT_LM_CACHE``, or `~/.cache/efficient_lm`."""
    named = os.environ.get("EFFICIENT_LM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "efficient_lm"


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs on disk, so that a second start is quick.

    ``JAX_COMPILATION_CACHE_DIR`` goes first. A home that cannot be written to only means that nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_root() / "compile"
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        usable = False
    if usable:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


class _Stderr(logging.StreamHandler):
    """Writes to whatever stderr is at the time: a progress bar puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def configure_logging() -> None:
    """This package's messages and other packages' warnings on stderr, one plain line each."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("efficient_lm").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)


def host_device() -> "jax.Device":
    """A device whose memory is the host's; the default one where ``JAX_PLATFORMS`` leaves CPUs out."""
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def surroundings(*packages: str) -> dict[str, object]:
    """What a figure depends on besides the code, with the versions of packages."""
    import jax

    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "cpu": f"{os.cpu_count()} x {processor()}",
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def processor() -> str:
    """The CPU's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
