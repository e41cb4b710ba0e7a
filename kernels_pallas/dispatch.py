"""How every operator picks an implementation: a named one runs or refuses, `auto` runs one that can and says which."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import jax

_logger = logging.getLogger("kernels_pallas")
_preferred = jax.make_user_context(default_value=None)


class Unsupported(ValueError):
    """A named implementation that cannot honour a call, or cannot run on this machine."""


@contextlib.contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """What `auto` takes inside, wherever it can: "pallas" or "xla"; "auto" leaves the choice to figures."""
    with _preferred(None if implementation == "auto" else implementation):
        yield


def choose(op: str, implementation: str, obstacles: Mapping[str, Sequence[str]]) -> str:
    """Name the implementation to run.

    `obstacles` maps every implementation of `op`, the preferred first, to the arguments or surroundings it cannot
    honour in this call. A named implementation with an obstacle raises `Unsupported` and says which can, an unknown
    name ValueError; `auto` takes the first without one, or the one that is `preferring`, and logs its choice once.
    """
    able = [name for name, reasons in obstacles.items() if not reasons]
    if implementation == "auto":
        name = _preferred.value if _preferred.value in able else able[0]
        _log_once(op, name)
        return name
    if implementation not in obstacles:
        raise ValueError(f"{op}: no implementation {implementation!r}; valid: auto, {', '.join(obstacles)}")
    if reasons := obstacles[implementation]:
        raise Unsupported(
            f"{op}: implementation {implementation!r} cannot honour {', '.join(reasons)}; can: {', '.join(able)}"
        )
    return implementation


def unfit(values: Mapping[str, jax.Array | None], *dtypes: str) -> list[str]:
    """The named arrays whose dtype a kernel does not take, in words."""
    given = {name: value for name, value in values.items() if value is not None}
    return [f"{name} of dtype {value.dtype}" for name, value in given.items() if value.dtype.name not in dtypes]


@functools.cache
def _log_once(op: str, name: str) -> None:
    _logger.info("%s: implementation %s", op, name)
