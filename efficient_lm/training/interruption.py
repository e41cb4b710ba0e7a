"""Signals that ask a run to stop."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

ECHO_SECONDS = 1.0
"""A signal that comes again so soon is the same one: launchers pass on what the terminal sent already."""

SHOW_CURSOR = "\033[?25h"


class Interruption:
    """Turns the first signal into a request to save and stop; a later one ends the process at once.

    A thread hears them, so that both work while the main thread compiles or waits for a device or a disk. A lost
    terminal (SIGHUP) is such a signal too, unless the process was told to ignore it, as by nohup.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal = 0
        self._heard_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self  # Only the main thread may set handlers; elsewhere the caller decides when to stop.
        heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, _let_the_thread_hear) for number in heard}
        self._end, begin = os.pipe()
        os.set_blocking(begin, False)
        self._begin, self._wakeup_before = begin, signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._begin)
        self._thread.join()
        os.close(self._end)

    def _listen(self) -> None:
        while heard := os.read(self._end, 1):
            if heard[0] in self._before:
                self._request(heard[0])

    def _request(self, number: int) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._heard_at = number, now
            log.warning("%s: saving and stopping; once more to stop at once", signal.Signals(number).name)
        elif now - self._heard_at > ECHO_SECONDS:
            if os.isatty(2):
                os.write(2, SHOW_CURSOR.encode())
            os._exit(128 + number)


def _let_the_thread_hear(number: int, frame: FrameType | None) -> None:
    """Python notes a signal for the thread only where it has a handler of its own."""
