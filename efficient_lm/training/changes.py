"""What is not as it was when a checkpoint was saved, and what follows from it: lines for a person."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from efficient_lm.composition import differences
from efficient_lm.config import RunConfig
from efficient_lm.training.portions import Portions
from efficient_lm.training.setup import Setup, schedule_of

OF_A_RUN = ("run.name", "run.dir", "init_from", "init_state", "tracker", "train.stop_at")
"""Keys that differ from run to run and change nothing of what is computed."""


def changes(before: RunConfig | None, setup: Setup, record: Mapping[str, Any]) -> Iterator[str]:
    """What has changed.

    Args:
        before: the config that the checkpoint was saved with, where it is known.
        setup: of the run that goes on.
        record: the checkpoint's, as `Session.save` writes it; older ones hold less.
    """
    if before is not None:
        for line in differences(before.dump(), setup.config.dump()):
            if not line.startswith(OF_A_RUN):
                yield f"going on with a changed config: {line}"
        yield from _consequences(before, setup, record["step"])
    saved, now = (each.get("layout") for each in (record, setup.provenance))
    if saved is not None and saved != now:
        yield f"going on with {_shown(now)}; the checkpoint was saved with {_shown(saved)}"
    if record.get("data", setup.provenance["data"]) != setup.provenance["data"]:
        yield (
            "the training data is not what the checkpoint was trained on, or in another order; "
            f"rows from step {record['step']:,} on are of the data that is there now"
        )


def _consequences(before: RunConfig, setup: Setup, step: int) -> Iterator[str]:
    old, new = (float(np.asarray(schedule(step))) for schedule in (schedule_of(before), setup.schedule))
    if not np.isclose(old, new, rtol=1e-5, atol=0.0):
        yield f"the learning rate of the next step would have been {old:.4g}, and is {new:.4g}"
    then, rows = (sizes.first(step) for sizes in (Portions(before.train).sizes, setup.portions.sizes))
    if then != rows:
        what = f"{rows - then:,} are left out" if rows > then else f"the last {then - rows:,} come again"
        yield (
            f"the data goes on at row {rows:,}, that of the step by the batch sizes there are now; "
            f"{then:,} rows were seen, so {what}"
        )


def _shown(layout: Mapping[str, Any]) -> str:
    mesh = " × ".join(f"{axis} {size}" for axis, size in layout["mesh"].items())
    processes = f" of {layout['processes']} processes" if layout["processes"] > 1 else ""
    return f"{layout['devices']} {'device' if layout['devices'] == 1 else 'devices'}{processes} ({mesh})"
