"""Many processes that train one model: how they start, agree on when to stop, and share what is counted.

One process alone starts nothing and pays nothing. With several (see `efficient_lm.training.group` for the variables),
all run the same program; process 0 alone writes to the run directory, besides the parts of checkpoints.
"""

import atexit
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_lm.errors import ConfigError, UserError
from efficient_lm.training.group import Group, free_address, group
from efficient_lm.training.line import Line, hold_aborts

if TYPE_CHECKING:
    from efficient_lm.config import RunConfig

GRACE = 3.0
"""Seconds in which the news may come that another process is gone, when this one meets an error it cannot explain."""

_line: Line | None = None
"""To the other processes of the run that goes on; None: there is one alone."""


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _line is None or _line.group.index == 0


def exchange(value: Any = None, name: str = "main") -> list[Any]:
    """What each process gave (anything of JSON), in their order; returns when all have asked.

    Questions of one name are answered in the order they are put; another thread takes another name.
    """
    return [value] if _line is None else _line.exchange(value, name)


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returned (anything of JSON) in process 0, which alone runs it; the others wait for it."""
    return exchange(make() if is_main() else None)[0]


def total(value: float) -> float:
    """The sum of what each process gave."""
    return sum(exchange(value))


def progress(step: int | None = None) -> None:
    """The main thread got somewhere: many processes that do not for `train.step_timeout` are stuck."""
    if _line is not None:
        _line.progress(step)


def moving(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; each one taken is progress."""
    for batch in batches:
        progress()
        yield batch


class Processes:
    """The processes of a run, used by `with` around all of it.

    Raises:
        ConfigError: variables that make no sense; processes that were started with different configs.
        ResourceError: not all came in time.
    """

    def __init__(self, config: "RunConfig"):
        self.config = config
        self.group = group()

    def __enter__(self) -> "Processes":
        global _line
        if self.group is None:
            return self
        train = self.config.train
        line = Line(
            self.group,
            _fingerprint(self.config),
            start_timeout=train.start_timeout,
            peer_timeout=train.peer_timeout,
            step_timeout=train.step_timeout,
            advice=f"; what {self.config.run.dir} has saved stays, and the same command goes on from there",
        )
        service = line.meet(free_address(self.group.host) if self.group.index == 0 else None)
        _line = line
        if self.group.index > 0:
            logging.getLogger("efficient_lm").setLevel(logging.ERROR)
        try:
            _start(self.group, service, train.start_timeout, train.peer_timeout)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _line
        line, _line = _line, None
        if line is None:
            return
        if error is None:
            line.leave()
            return
        if not isinstance(error, UserError | KeyboardInterrupt):
            # A collective breaks when its partner dies, and the line knows better who that was.
            time.sleep(GRACE)
        status = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "status", 1)
        line.fail((str(error).strip().splitlines() or [type(error).__name__])[0][:400], status)
        # Without the others, JAX's own goodbye at the end of the interpreter would wait, or abort.
        atexit.register(_leave, status)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fingerprint(config: "RunConfig") -> str:
    facts = [config.dump(), importlib.metadata.version("jax")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _start(found: Group, service: str, start_timeout: float, peer_timeout: float) -> None:
    """Start `jax.distributed`, unless an earlier run of this Python process has."""
    if jax.distributed.is_initialized():
        return
    hold_aborts()
    # JAX's own would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            service,
            found.count,
            found.index,
            local_device_ids=list(found.local_devices),
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"{found.bind or '[::]'}:{service.rpartition(':')[2]}",
            initialization_timeout=round(start_timeout),
            # The line is to notice first, and to say it in words.
            heartbeat_timeout_seconds=round(max(100, 3 * peer_timeout)),
            shutdown_timeout_seconds=30,
        )
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise ConfigError("many processes: train has to come before anything else that uses JAX") from error
        raise


class Agreement:
    """Whether to stop, answered alike by every process at the same step.

    Each step carries a tiny collective, the largest of all answers, which is read one step late, so that neither the
    host nor a device waits for it. One process alone is its own majority, at once.

    Attributes:
        own: this process's answer: the number of a signal, 1 if its time is over, 0 to go on.
        code: what was agreed on.
    """

    def __init__(self, own: Callable[[], int]):
        self.own, self.code = own, 0
        self._waiting: jax.Array | None = None
        devices = Mesh(np.asarray(jax.devices()), "all")
        self._everywhere = NamedSharding(devices, P("all"))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(devices, P()))

    def reached(self, step: int) -> bool:
        """Whether all stop before the step that would come next; `step` are done."""
        progress(step)
        if jax.process_count() == 1:
            self.code = int(self.own())
            return self.code > 0
        votes = np.full(jax.local_device_count(), self.own(), np.int32)
        asked = self._most(jax.make_array_from_process_local_data(self._everywhere, votes))
        if self._waiting is not None:
            self.code = int(self._waiting)
        self._waiting = asked
        return self.code > 0

    @property
    def signal(self) -> int:
        """The signal that ends the run, if one does."""
        return self.code if self.code > 1 else 0
