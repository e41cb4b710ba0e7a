"""How every operator picks an implementation: a named one runs or refuses, `auto` runs one that can and says which."""

import functools
import logging
from collections.abc import Mapping, Sequence

import jax

_logger = logging.getLogger("kernels_pallas")


def choose(op: str, implementation: str, obstacles: Mapping[str, Sequence[str]]) -> str:
    """Name the implementation to run.

    `obstacles` maps every implementation of `op`, the preferred first, to the arguments or surroundings it cannot
    honour in this call. A named implementation with an obstacle, or an unknown name, raises ValueError and says which
    can; `auto` takes the first without one, and logs its choice once.
    """
    able = [name for name, reasons in obstacles.items() if not reasons]
    if implementation == "auto":
        _log_once(op, able[0])
        return able[0]
    if implementation not in obstacles:
        raise ValueError(f"{op}: no implementation {implementation!r}; valid: auto, {', '.join(obstacles)}")
    if reasons := obstacles[implementation]:
        raise ValueError(
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
