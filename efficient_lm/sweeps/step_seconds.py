"""How long a step takes on this machine, measured in a process of its own: it leaves nothing on the devices."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from efficient_lm.config import RunConfig, read_config, save_config
from efficient_lm.errors import ConfigError, ResourceError, UserError
from efficient_lm.sweeps.durations import Seconds

WARM, STEPS, LEAST_SECONDS = 2, 8, 1.0
"""Steps that are not counted; of those that are, so many at least, and as many as take so long together."""


def measured_seconds(config: RunConfig) -> Seconds:
    """Of one step of each shape that a run's batches have: the median of several, with the batch brought there.

    Raises:
        ConfigError, ResourceError: what kept the run from being started; the latter also where memory ran out.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save_config(path, config)
        command = [sys.executable, "-m", "efficient_lm.sweeps.step_seconds", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        fault = ConfigError if done.returncode == ConfigError.status else ResourceError
        raise fault(f"budget.seconds: no step could be measured: {said}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {(rows, length): seconds for rows, length, seconds in found}


def measure(config: RunConfig) -> Seconds:
    """The same in this process."""
    from efficient_lm.training.portions import cut, trained_on
    from efficient_lm.training.setup import prepare
    from kernels_pallas.dispatch import preferring

    setup, found = prepare(config), {}
    with setup.layout.active(), preferring(config.train.kernels):
        state = setup.fresh_state()
        for portion in setup.portions.portions:
            taken: list[float] = []
            for number, batch in enumerate(setup.data.train_batches(portion.rows)):
                began = time.perf_counter()
                state, metrics = setup.step(state, setup.layout.batch(trained_on(cut(batch, portion.length))))
                float(metrics["loss"])
                taken += [time.perf_counter() - began] if number >= WARM else []
                if len(taken) >= STEPS and sum(taken) >= LEAST_SECONDS:
                    break
            found[portion.batch] = median(taken)
    return found


def main(path: str) -> int:
    """Print what is measured for a config file, as JSON; a fault goes to stderr, and its status is returned."""
    try:
        found = measure(read_config(path))
    except UserError as error:
        print(str(error).replace("\n", "; "), file=sys.stderr)
        return error.status
    print(json.dumps([[*shape, seconds] for shape, seconds in found.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
