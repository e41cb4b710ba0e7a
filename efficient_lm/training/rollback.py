"""Going back to the last good checkpoint, with the data moved past the batches that did harm."""

import logging
from typing import Any

import jax

from efficient_lm.training.processes import from_main
from efficient_lm.training.resuming import return_to
from efficient_lm.training.session import Session

log = logging.getLogger(__name__)


def roll_back(session: Session, state: dict[str, Any]) -> dict[str, Any]:
    """The state of the newest checkpoint before the harm, or of the run's beginning; `state` is given up.

    The steps from there on take the batches that follow the harmful ones. A run that is killed before its next
    checkpoint does the same again, for nothing here depends on anything but the checkpoint.
    """
    harm, progress, checkpoints = session.harm, session.progress, session.checkpoints
    checkpoints.wait()
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    # Steps that are no numbers change nothing, so a checkpoint from among them will do where there is none before.
    steps = from_main(lambda: checkpoints.steps)
    earlier = [step for step in steps if step < harm.first] or steps[:1]
    # One that was saved because a signal came is passed over, for a run that none came to has it not.
    regular = [step for step in earlier if step % session.setup.config.train.checkpoint_every == 0]
    state, there = return_to(session.setup, session.run, checkpoints, regular or earlier)
    state["nonfinite"] = jax.device_put(0 * state["nonfinite"], state["nonfinite"].sharding)
    checkpoints.set_aside_after(there.step, "rolled_back")
    sizes = session.setup.portions.sizes
    passed = sizes.first(harm.last) - sizes.first(there.step)
    there.skipped_rows, there.rollbacks = progress.skipped_rows + passed, progress.rollbacks + 1
    log.warning(
        "%s: back to step %d and past %d rows of data, for the %d. of at most %d times",
        harm.reason, there.step, passed, there.rollbacks, session.setup.config.train.rollback.at_most,
    )  # fmt: skip
    session.start_over(there)
    return state
