"""Work behind the back of training, which gives way to it."""

import contextlib
import os
import sys
from pathlib import Path

NICENESS = 19
"""Added to that of the process: such a thread has about a seventieth of a processor that a step wants whole."""

OF_TENSORSTORE = "ts_pool"
"""How the names of the threads begin that TensorStore starts for itself, and keeps for a while."""


def give_way() -> None:
    """Give the calling thread, those it starts from here on, and TensorStore's a low priority.

    Only Linux has priorities of threads. There is no way back for a process without privileges.
    """
    if sys.platform != "linux":
        return
    lowered = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS, 19)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, lowered)
    for thread in threads_of_tensorstore():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, lowered)


def threads_of_tensorstore() -> list[int]:
    """Return the system's numbers of the threads TensorStore keeps (Linux).

    A thread that ends while its name is read is passed over.
    """
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().startswith(OF_TENSORSTORE):
                found.append(int(thread.name))
    return found
