"""Compiling for accelerators that are not there: TPU pods by libtpu, Hopper GPUs by jax's CUDA plugin and ptxas.

A compiled program tells its memory per device and, for Mosaic GPU kernels, what the assembler made of them. It tells
no time and no numbers. Needs the packages of the extra `ahead`; the process itself stays on the CPU.
"""

import contextlib
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.ahead.collectives import Collective
from kernels_pallas.ahead.collectives import collectives as exchanged
from kernels_pallas.ahead.products import product_flops
from kernels_pallas.ahead.program_text import ProgramText
from kernels_pallas.ahead.traffic import traffic as moved
from kernels_pallas.target import Target, compiling_for, of_device

HERE = Path(__file__).parent
GPUS = ("h100", "h200")
GPUS_PER_HOST = 8
PACKAGES = HERE.parents[1] / ".ahead"
"""Where `make ahead` puts the compilers of a checkout, so that nothing else finds a TPU or a GPU to look for."""
REGISTERS, THREADS, SHARED_BYTES, BLOCKS = 65536, 2048, 228 * 1024, 32
"""Of a multiprocessor of a Hopper GPU: 32-bit registers, threads, shared memory, and blocks at a time."""
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""What libtpu would ask the machine, and complain about: no TPU is touched, and none kept from others."""
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


@dataclass(frozen=True)
class Compiled:
    """A program.

    Attributes:
        peak_bytes, temporary_bytes: of one device, the most there is at a time, and of that what lives inside a call.
        kernels: its Mosaic GPU kernels.
        program: the compiled object of jax.
        jaxpr: what was traced.
    """

    peak_bytes: int
    temporary_bytes: int
    kernels: list[Kernel]
    program: Any
    jaxpr: Any

    @classmethod
    def of(cls, traced: Any, program: Any, target: Target, kernels: Sequence[Kernel] = ()) -> "Compiled":
        """What was traced, and compiled for a target, by jax."""
        memory = program.memory_analysis()
        peak = memory.peak_memory_in_bytes
        if target.platform == "cpu":
            # The compiler's own figure is of the arguments alone there.
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
        return cls(peak, memory.temp_size_in_bytes, list(kernels), program, traced.jaxpr)

    @cached_property
    def text(self) -> ProgramText:
        """Its operations."""
        return ProgramText(self.program.as_text())

    @cached_property
    def flops(self) -> float:
        """Of its matrix products, on all devices together (see `products.product_flops`)."""
        return product_flops(self.jaxpr)

    @cached_property
    def traffic(self) -> int:
        """Bytes that one device reads from and writes to its main memory in one call (see `traffic.traffic`)."""
        return moved(self.text)

    @cached_property
    def collectives(self) -> list[Collective]:
        """What devices exchange."""
        return exchanged(self.text)


class Missing(RuntimeError):
    """A compiler that is not installed.

    Attributes:
        package: its name.
    """

    def __init__(self, package: str, why: str = ""):
        super().__init__(f"the package {package} is missing" + (f": {why}" if why else ""))
        self.package = package


class TooLarge(RuntimeError):
    """A program that the compiler refuses, because a device has not the memory for it.

    Attributes:
        needed, available: bytes of a device.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"a program needs {needed / 1e9:.1f} GB of a device that has {available / 1e9:.1f} GB")
        self.needed, self.available = needed, available


def devices(topology: str) -> Sequence[Any]:
    """The devices of a topology, in the order of hosts.

    Args:
        topology: "h200" or "h100", "h200:GPUS", "h200:HOSTSxGPUS", or of TPUs such as "v5e:2x2" or "v5p:4x4x4". More
            than eight GPUs are hosts of eight.

    Raises:
        ValueError: there is no such topology. Missing: the plugin that compiles for it is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    kind, _, shape = topology.partition(":")
    if kind.startswith("v"):
        _need("libtpu", "libtpu")
        one = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
        return _described(topology, platform="tpu", topology_name=topology, **one)
    if kind not in GPUS:
        near = ", ".join(GPUS)
        raise ValueError(f"topology '{topology}': valid: {near}, or TPUs such as v5e:2x2, v5p:2x2x1, v6e:2x2")
    hosts, gpus = _hosts(topology, shape)
    _need("jax-cuda13-plugin", "jax_cuda13_plugin")
    _need("jax-cuda13-pjrt", "jax_plugins.xla_cuda13")
    _find_assembler()
    target = (HERE / f"{kind}.txtpb").read_text()
    return _described(topology, topology_name="", platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=target)


def _hosts(topology: str, shape: str) -> tuple[int, int]:
    """Hosts, and GPUs of each."""
    sizes = [int(size) for size in shape.split("x") if size.isdigit() and int(size)] if shape else [1]
    if len(sizes) != len(shape.split("x")) or len(sizes) > 2:
        raise ValueError(f"topology '{topology}': GPUs are counted, or hosts and the GPUs of each: h200:8, h200:4x8")
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    count = sizes[0]
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise ValueError(
            f"topology '{topology}': more than {GPUS_PER_HOST} GPUs are hosts of {GPUS_PER_HOST}, and {count} are not; "
            f"nearest: {count // GPUS_PER_HOST * GPUS_PER_HOST}"
        )
    return (1, count) if count <= GPUS_PER_HOST else (count // GPUS_PER_HOST, GPUS_PER_HOST)


def _need(package: str, module: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Missing(package)


def _find_assembler() -> None:
    """XLA looks for ptxas on the path alone; the wheels put it beside Python's packages."""
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations if packages else ():
        tools = str(Path(place) / "cu13" / "bin")
        if Path(tools).is_dir() and tools not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = tools + os.pathsep + os.environ["PATH"]
    if shutil.which("ptxas") is None:
        raise Missing("nvidia-cuda-nvcc", "it has ptxas, which assembles for NVIDIA GPUs")


def _described(asked: str, topology_name: str, **options: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(topology_name, **options).devices
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, jax.errors.JaxRuntimeError):
            # JAX itself, not a compiler: it knows no such platform.
            raise Missing("jax-cuda13-pjrt", f"or JAX had started before it could be found: {error}") from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"topology '{asked}': {first}") from error


def compile_ahead(
    function: Callable, arguments: Sequence[Any], topology: str, mesh: Mesh | None = None, **options: Any
) -> Compiled:
    """Compile ``function(*arguments)`` for a topology.

    Args:
        arguments: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are whole on every device.
        topology: see `devices`; its first device alone is used unless there is a mesh.
        mesh: of devices of that topology.
        options: of `jax.jit`.

    Raises:
        TooLarge: the compiler says that a device has not the memory. It does for TPUs; a program that is too large for
            a GPU compiles, and `peak_bytes` is to be compared with what the GPU has.
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
    with tempfile.TemporaryDirectory() as folder, _reports_in(folder), uncached(), compiling_for(target), ambient:
        traced = jax.jit(function, **options).trace(*arguments)
        program = _compiled(traced.lower(), arguments)
        kernels = [_read(report) for report in sorted(Path(folder).glob("*.ptxas"))]
    return Compiled.of(traced, program, target, kernels)


def _compiled(lowered: Any, arguments: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _USED.search(str(error)):
            raise TooLarge(_bytes(found[1]), _bytes(found[2])) from error
        if found := _TEMPORARIES.search(str(error)):
            given = sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(arguments)
            )
            raise TooLarge(_bytes(found[1]) + given, _bytes(found[2])) from error
        raise


_USED = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
"""What libtpu says when the memory is too small: of all that a program needs, or before it knows, of a part."""


def _bytes(said: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return round(float(said.rstrip("KMGT")) * units.get(said[-1], 1))


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """No program comes from the cache of programs or goes into it.

    One that was compiled ahead cannot be read back without its device, and one read back leaves no reports.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once for a process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _reports_in(folder: str) -> Iterator[None]:
    """Mosaic GPU leaves what it makes of every kernel in `folder`."""
    name = "MOSAIC_GPU_DUMP_TO"
    was = os.environ.get(name)
    os.environ[name] = folder
    try:
        yield
    finally:
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
