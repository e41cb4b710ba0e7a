"""Compiling for accelerators that are not there: TPU pods by libtpu, Hopper GPUs by jax's CUDA plugin and ptxas.

A compiled program tells its memory per device and, for Mosaic GPU kernels, what the assembler made of them. It tells
no time and no numbers. Needs the packages of the extra `ahead`; the process itself stays on the CPU.
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.target import compiling_for, of_device

HERE = Path(__file__).parent
GPUS = ("h100", "h200")
REGISTERS, THREADS, SHARED_BYTES, BLOCKS = 65536, 2048, 228 * 1024, 32
"""Of a multiprocessor of a Hopper GPU: 32-bit registers, threads, shared memory, and blocks at a time."""
_RESERVED_BYTES = 1024  # of shared memory, by the driver, for every block


class Kernel(NamedTuple):
    """What ptxas says of one Mosaic GPU kernel.

    Attributes:
        registers: per thread. threads: per block. shared_bytes: per block, barriers not counted.
        spilled_bytes: stored to local memory because registers ran out; 0 in a good kernel.
        serialized: wgmma waits for its predecessor each time (ptxas warning C7512).
        instructions: of the PTX, how often each kind is written (a loop's body counts once).
    """

    name: str
    registers: int
    threads: int
    shared_bytes: int
    spilled_bytes: int
    serialized: bool
    instructions: Counter

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks fit on a multiprocessor at a time: its occupancy."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (per_warp * -(-self.threads // 32))
        by_memory = SHARED_BYTES // (self.shared_bytes + _RESERVED_BYTES)
        return min(by_registers, by_memory, THREADS // self.threads, BLOCKS)


class Compiled(NamedTuple):
    """A program: bytes per device at its peak and of temporaries, its kernels, and the compiled object of jax."""

    peak_bytes: int
    temporary_bytes: int
    kernels: list[Kernel]
    program: Any


def devices(topology: str) -> Sequence[Any]:
    """The devices of "h200", "h100", "h200:HOSTSxGPUS", or of a TPU topology such as "v5e:2x2" or "v5p:4x4x4".

    Raises:
        ValueError: an unknown kind of GPU. RuntimeError: the plugin that compiles for it is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    kind, _, shape = topology.partition(":")
    if kind.startswith("v"):
        return _described("libtpu", platform="tpu", topology_name=topology)
    if kind not in GPUS:
        raise ValueError(
            f"topology {topology!r}: valid: {', '.join(GPUS)}, or TPUs such as v5e:2x2, v5p:2x2x1, v6e:2x2"
        )
    _find_assembler()
    target = (HERE / f"{kind}.txtpb").read_text()
    shape = f"1x{shape or '1x1'}"
    return _described("jax-cuda13-plugin", topology_name="", platform="cuda", topology=shape, target_config=target)


def _find_assembler() -> None:
    """XLA looks for ptxas on the path alone; the wheels put it beside Python's packages."""
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations if packages else ():
        tools = str(Path(place) / "cu13" / "bin")
        if Path(tools).is_dir() and tools not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = tools + os.pathsep + os.environ["PATH"]


def _described(package: str, topology_name: str, **options: str) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(topology_name, **options).devices
    except Exception as error:
        raise RuntimeError(f"compiling for {options['platform']} needs the package {package}: {error}") from error


def compile_ahead(
    function: Callable, arguments: Sequence[Any], topology: str, mesh: Mesh | None = None, **options: Any
) -> Compiled:
    """Compile ``function(*arguments)`` for a topology.

    Args:
        arguments: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are whole on every device.
        topology: see `devices`; its first device alone is used unless there is a mesh.
        mesh: of devices of that topology.
        options: of `jax.jit`.
    """
    ambient = contextlib.nullcontext()
    if mesh is None:
        mesh = Mesh(np.asarray(devices(topology)[:1]), ("device",))
        ambient = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)  # tells Mosaic which TPU it compiles for
    whole = NamedSharding(mesh, P())

    def placed(value):
        return value if value.sharding else jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=whole)

    arguments = jax.tree.map(placed, tuple(arguments))
    target = of_device(mesh.devices.flat[0])
    with tempfile.TemporaryDirectory() as folder, _reports_in(folder), compiling_for(target), ambient:
        program = jax.jit(function, **options).lower(*arguments).compile()
        kernels = [_read(report) for report in sorted(Path(folder).glob("*.ptxas"))]
    memory = program.memory_analysis()
    return Compiled(memory.peak_memory_in_bytes, memory.temp_size_in_bytes, kernels, program)


@contextlib.contextmanager
def _reports_in(folder: str) -> Iterator[None]:
    """Mosaic GPU leaves what it makes of every kernel in `folder`; nothing comes from the cache of programs."""
    before, name = jax.config.jax_enable_compilation_cache, "MOSAIC_GPU_DUMP_TO"
    was = os.environ.get(name)
    os.environ[name] = folder
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        os.environ.pop(name) if was is None else os.environ.update({name: was})


def _read(report: Path) -> Kernel:
    text, ptx = report.read_text(), report.with_suffix(".ptx").read_text()
    resources = report.with_suffix(".resources.txt").read_text()
    threads = [int(n) for n in re.findall(r"\.(?:reqntid|maxntid) (\d+)", ptx)]
    return Kernel(
        name=report.stem,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        threads=max(threads, default=128),
        shared_bytes=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
        spilled_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text)),
        serialized="C7512" in text,
        instructions=Counter(re.findall(r"^\s+(?:@%?\w+ )?([a-z]\w+(?:\.\w+)*)", ptx, re.MULTILINE)),
    )
