"""The training loop. It reads from top to bottom."""

from typing import Any

from efficient_lm.config import RunConfig
from efficient_lm.errors import DataError, DivergedError
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.clock import Clock
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.portions import trained_on
from efficient_lm.training.processes import Agreement, Processes
from efficient_lm.training.resuming import resume_or_start
from efficient_lm.training.rollback import roll_back
from efficient_lm.training.run_directory import RunDirectory
from efficient_lm.training.session import Session
from efficient_lm.training.setup import Setup, prepare
from kernels_pallas.dispatch import preferring


def train(config: RunConfig) -> dict[str, Any]:
    """Train from a config, or go on from the newest checkpoint of its run directory.

    Returns:
        What `summary.json` holds. `stopped_by` is there only if a signal ended the run early (it is then resumable).

    Raises:
        ConfigError, DataError: before anything is written; DataError also while training, then with all steps saved.
        CheckpointError: the run directory is in use, damaged or of another architecture.
        DivergedError: too many steps in a row that were not a number; everything up to there is saved.
        ResourceError: the disk is full or refuses otherwise; the newest good checkpoint stays.
    """
    clock = Clock()
    with Processes(config):
        return _train(prepare(config), clock)


def _train(setup: Setup, clock: Clock) -> dict[str, Any]:
    config = setup.config
    kernels = preferring(config.train.kernels)
    with setup.layout.active(), kernels, RunDirectory(config.run.dir) as run, Interruption() as interruption:
        checkpoints = Checkpoints(run.checkpoints, config.train.retention)
        with clock.measure("restore"):
            state, progress = resume_or_start(setup, run, checkpoints)
        session = Session(setup, run, checkpoints, progress, clock, interruption)
        try:
            if progress.unvalidated:
                session.validate(state, config.train.evaluate_rows)
            batches = session.batches()
            session.prepare_saves(state)
            clock.begin()
            stop = Agreement(lambda: int(interruption.signal or session.out_of_time))
            while not session.at_end and not stop.reached(progress.step):
                state, metrics = session.step(state, setup.layout.batch(trained_on(next(batches))))
                session.stepped(metrics)
                evaluating, saving = (
                    session.due(config.train.evaluate_every),
                    session.due(config.train.checkpoint_every),
                )
                if evaluating or saving or session.complete:
                    session.settle()
                if session.harm is not None:
                    state, batches = roll_back(session, state), session.batches()
                    continue
                if evaluating:
                    session.validate(state, config.train.evaluate_rows)
                if saving:
                    session.save(state, going_on=True)
            session.settle()
            session.save(state)
            if session.complete:
                session.validate(state, final=True)
            return session.finish(stop.signal or interruption.signal)
        except (DivergedError, DataError) as error:
            raise type(error)(f"{error}; {session.rescue(state, isinstance(error, DivergedError))}") from error
        finally:
            session.close()
