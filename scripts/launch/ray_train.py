r"""Trains one model with several processes that Ray places, on machines that share their files:

    python scripts/launch/ray_train.py --processes 4 --gpus 8 experiment=transformer_1b parallelism=fsdp \
        data.source.paths=[/shared/text/*.parquet] tokenizer.path=/shared/tokenizer.json run.dir=/shared/runs/one

When a machine is lost all processes end, and the run goes on with new ones. Ctrl-C saves and stops.
"""

import argparse
import sys
import time
from pathlib import Path

from efficient_lm.cli.main import guarded
from efficient_lm.errors import ConfigError, DataError, DivergedError
from efficient_lm.sweeps.launchers.base import Job, Launcher
from efficient_lm.sweeps.launchers.ray import RayLauncherSpec
from efficient_lm.training.interruption import Interruption

FINAL = (0, 1, ConfigError.status, DataError.status, DivergedError.status)
"""Exit statuses that would come again."""


def main() -> int:
    """Train, and return the exit status of process 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="auto", help="of the Ray cluster; local starts one on this machine")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1.0, help="of each process")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each process")
    parser.add_argument("--restarts", type=int, default=20, help="after machines were lost")
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="as of train")
    return guarded(lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    """Start the processes, and again when some are lost."""
    from efficient_lm.config import load_run_config

    directory = Path(load_run_config(options.overrides).run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "efficient_lm", "train", *options.overrides]
    job = Job(directory.name, program, directory, {}, None, directory / "output.log")
    asked = {name: getattr(options, name) for name in ("address", "processes", "cpus", "gpus")}
    launcher = RayLauncherSpec(concurrent=1, **asked).build()
    try:
        with Interruption() as interruption:
            for _ in range(options.restarts + 1):
                status = follow(launcher, job, interruption)
                if status in FINAL or interruption.signal:
                    break
        return status
    finally:
        launcher.close()


def follow(launcher: Launcher, job: Job, interruption: Interruption) -> int:
    """Start the processes, show what the first one says, and wait for its exit status."""
    job.log.touch()
    with open(job.log, errors="replace") as log:
        log.seek(0, 2)
        handle, asked, status = launcher.submit(job), False, None
        while status is None:
            if interruption.signal and not asked:
                handle.cancel()
                asked = True
            time.sleep(0.5)
            status = handle.poll()
            print(log.read(), end="", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
