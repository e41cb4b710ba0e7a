"""Which processes make up a run: read from the variables that a launcher sets. Imports no JAX.

| variables | set by |
|---|---|
| `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` | a user, a pod, `join` |
| `SLURM_JOB_ID`, `SLURM_STEP_NODELIST`, `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` or `SLURM_NTASKS` | srun |
| `JAX_LOCAL_DEVICE_IDS` (0,1), `JAX_COORDINATOR_PORT` (under SLURM), `JAX_COORDINATOR_BIND_ADDRESS` | a user |

The first three go before SLURM's, one by one; ``JAX_NUM_PROCESSES=1`` makes one process of anything.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from efficient_lm.errors import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOCAL_DEVICES, PORT, BIND = "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT", "JAX_COORDINATOR_BIND_ADDRESS"
_IN_A_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        host, port: where process 0 waits for the others.
        count: how many there are.
        index: which one this is.
        local_devices: GPUs of this machine that are this process's; empty: all it sees.
        bind: the address that process 0 listens at; "" stands for all of its machine.
    """

    host: str
    port: int
    count: int
    index: int
    local_devices: tuple[int, ...] = ()
    bind: str = ""


def group(environment: Mapping[str, str] = os.environ) -> Group | None:
    """The processes that the environment speaks of; None if there is one alone.

    Raises:
        ConfigError: variables that are half given, or make no sense.
    """
    slurm = all(name in environment for name in _IN_A_STEP)
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    named = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    given = {COUNT: COUNT, INDEX: INDEX}
    if slurm:
        given = {COUNT: COUNT if COUNT in named else tasks, INDEX: INDEX if INDEX in named else "SLURM_PROCID"}
    if not named and not slurm:
        return None
    if _number(environment, given[COUNT], 1) == 1:
        return None
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in named]
    if missing and not slurm:
        raise ConfigError(
            f"{missing[0]}: is not set, though {named[0]}={environment[named[0]]} is; many processes need {ADDRESS} "
            f"(host:port of process 0), {COUNT} and {INDEX}; one needs none of them"
        )
    count, index = _number(environment, given[COUNT], 1), _number(environment, given[INDEX], 0)
    if index >= count:
        raise ConfigError(f"{given[INDEX]}: {index} is not below {given[COUNT]}={count}; valid: 0 to {count - 1}")
    host, port = _address(environment[ADDRESS], ADDRESS) if ADDRESS in named else _slurm_address(environment)
    bind = _address(environment[BIND], BIND)[0] if environment.get(BIND) else ""
    return Group(host, port, count, index, _local_devices(environment, slurm), bind)


def join(address: str, count: int, index: int) -> None:
    """Make this Python process one of several of a run, before anything of JAX is used in it: for actors, say Ray's.

    It sets `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; `train` then finds the others.

    Args:
        address: host:port of process 0, as `free_address` gives it there.
        count: of processes.
        index: of this one.
    """
    os.environ.update({ADDRESS: address, COUNT: str(count), INDEX: str(index)})
    group()


def free_address(host: str | None = None) -> str:
    """``host:port`` of this machine where nothing listens now; `host` by default is the machine's name."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        name = host or socket.gethostname()
        return f"[{name}]:{probe.getsockname()[1]}" if ":" in name else f"{name}:{probe.getsockname()[1]}"


def refuse_many(verb: str) -> None:
    """Refuse a verb that runs as one process. Raises `ConfigError` where several were started."""
    found = group()
    if found is not None:
        raise ConfigError(
            f"{verb}: runs as one process, and {found.count} were started; start one, or set {COUNT}=1 for each alone"
        )


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}: '{text}' is not a whole number of at least {least}")
    return int(text)


def _address(text: str, name: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{name}: '{text}' is not host:port, as 10.0.0.1:1234 is")
    return host.strip("[]"), int(port)


def _slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first machine of the step, and a port that follows from the job and its step."""
    nodes = environment["SLURM_STEP_NODELIST"]
    prefix, first = re.fullmatch(r"([^\[,]*)(?:\[([^\],-]*).*)?(?:,.*)?", nodes).groups()
    if environment.get(PORT):
        return _address(f"{prefix}{first or ''}:{environment[PORT]}", PORT)
    numbers = [_number(environment, name, 0) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return prefix + (first or ""), 61440 + (numbers[0] + 257 * numbers[1]) % 4096


def _local_devices(environment: Mapping[str, str], slurm: bool) -> tuple[int, ...]:
    """Named ones; under SLURM, one for each of several tasks of a machine that all see the same GPUs."""
    text = environment.get(LOCAL_DEVICES, "")
    if text:
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise ConfigError(f"{LOCAL_DEVICES}: '{text}' is not a list of numbers, as 0,1 is")
        return tuple(map(int, text.split(",")))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    if not slurm or bound or re.fullmatch(r"1(\(x\d+\))?", tasks):
        return ()
    local = _number(environment, "SLURM_LOCALID", 0)
    return () if local is None else (local,)
