"""Processes that run a sweep of stub runs, forked from one that has imported what they need.

A line of JSON on stdin (overrides) starts one and prints its number; ``wait NUMBER`` prints its exit status.
"""

import json
import os
import sys
from pathlib import Path

import optuna

from efficient_lm.errors import UserError
from efficient_lm.runtime import configure_logging
from efficient_lm.sweeps import running
from efficient_lm.sweeps.checking import Checked
from efficient_lm.sweeps.config import read_sweep
from efficient_lm.sweeps.sweep import run_sweep

STUB = (sys.executable, "-S", "-E", str(Path(__file__).with_name("stub_train.py")))


class Checker:
    """Finds nothing wrong."""

    def check(self, questions):
        for question in questions:
            seed = next((int(t.split("=")[1]) for t in question.overrides if t.startswith("run.seed=")), 0)
            plain = [text for text in question.overrides if not text.startswith("run.")]
            yield Checked((), {}, {"flops": 2.0}, seed, 6, {"overrides": plain})

    def rest(self):
        pass

    close = rest


def sweep(overrides):
    """What `run_sweep` gives, of stub runs and without a second between looks."""
    running.POLL_SECONDS, running.WATCH_SECONDS, running.LOOK_SECONDS = 0.01, 0.01, 0.1
    config, axes = read_sweep(overrides, ())
    return run_sweep(config, axes, program=STUB, make_checker=Checker)


def _child(overrides):
    configure_logging()
    try:
        result = sweep(overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 128 + result.stopped_by if result.stopped_by else 0


def main():
    optuna.create_study(storage="sqlite://")  # Imports what Optuna puts off.
    for line in sys.stdin:
        if line.startswith("wait"):
            status = os.waitstatus_to_exitcode(os.waitpid(int(line.split()[1]), 0)[1])
            print(status, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            asked = json.loads(line)
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.close(0)
            status = _child(asked["overrides"])
            sys.stdout.flush()
            os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
