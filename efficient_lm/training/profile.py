"""A trace of some steps, written by XLA's profiler."""

import logging
import re
from pathlib import Path
from typing import Annotated, Any

import jax
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

log = logging.getLogger(__name__)

FOLDER = "profile"


def span_of(text: str) -> range:
    """The steps that ``start:stop`` names: from `start`, counted from 1, up to and without `stop`."""
    start, stop = map(int, text.split(":"))
    return range(start, stop)


def _checked(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, int):
        # YAML reads 10:15 as a number of base 60.
        raise PydanticCustomError("span", '{value} is a number; in a YAML file, quote it: "10:15"', {"value": value})
    if not isinstance(value, str) or not re.fullmatch(r"\d+:\d+", value):
        raise PydanticCustomError(
            "span", "'{value}' is no span of steps; write start:stop, as 10:15 for steps 10 to 14", {"value": value}
        )
    span = span_of(value)
    if span.start < 1 or not span:
        least = max(span.start, 1)
        raise PydanticCustomError(
            "span",
            "'{value}' has no step in it: steps count from 1, and the last is the one before stop; nearest: {near}",
            {"value": value, "near": f"{least}:{max(span.stop, least + 1)}"},
        )
    return value


StepSpan = Annotated[str, BeforeValidator(_checked)]
"""``start:stop``, some steps of a run."""


class Profile:
    """Traces the steps of a span, once; what goes wrong with that is a warning, and the run goes on.

    Args:
        span: of steps; an empty one traces nothing.
        folder: where the trace is written.
    """

    def __init__(self, span: range, folder: Path):
        self._span, self._folder, self._running = span, folder, False

    def before(self, number: int, state: Any) -> None:
        """Step `number` is about to begin, with `state`, which is waited for at both ends of the span alone."""
        if self._running and number >= self._span.stop:
            jax.block_until_ready(state)
            self.stop()
        elif not self._running and number in self._span:
            jax.block_until_ready(state)
            self._start()

    def after(self, number: int) -> None:
        """Step `number` has been read: the last of a run has none behind it."""
        if number >= self._span.stop - 1:
            self.stop()

    def stop(self) -> None:
        """Write the trace, if one is being made."""
        if not self._running:
            return
        self._running, self._span = False, range(0)
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._give_up(error)
            return
        log.warning(
            "profile: a trace is in %s; open it with `xprof --logdir %s` (pip install xprof), with TensorBoard and its "
            "profile plugin, or drop its *.trace.json.gz on https://ui.perfetto.dev",
            self._folder, self._folder,
        )  # fmt: skip

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Calls of Python would be most of the trace, and slow what is measured.
        try:
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._span = range(0)
        log.warning("profile: no trace of these steps: %s", (str(error).splitlines() or [repr(error)])[0])
