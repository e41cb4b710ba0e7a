"""A sweep's state in one SQLite file: Optuna's storage, and beside it which process has which arm. Imports no jax.

Every run is a trial. Of an arm with several, retried after a fault, the newest counts. The file is made whole beside
its place and then linked there, so that two processes that start at once, or one that is killed, leave one good file.
"""

import contextlib
import json
import logging
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from efficient_lm.composition import differences
from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.sweeps.launchers.local import alive, reference_of

log = logging.getLogger(__name__)

STUDY_FILE = "study.db"
ASKED = "asked"
"""Attribute of the study: what makes it this sweep."""
WAIT_SECONDS = 60
"""For another process that writes."""
SILENT_SECONDS = 180.0
"""Without a sign of life from another machine, after which its arms may be taken over."""
_CLAIMS = """CREATE TABLE IF NOT EXISTS claims (
    arm TEXT PRIMARY KEY, owner TEXT NOT NULL, beat REAL NOT NULL, reference TEXT NOT NULL)"""

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Study:
    """The state of a sweep.

    Attributes:
        optuna: the study, for samplers and pruners.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        self._storage = _storage(path)
        self.optuna = optuna.load_study(study_name=name, storage=self._storage)
        self._database = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
        self._owner = reference_of(os.getpid())

    @classmethod
    def open(cls, folder: Path, asked: Mapping[str, Any], directions: Sequence[str]) -> "Study":
        """The study of a folder, made if there is none.

        Args:
            asked: plain values that tell the sweep from others.
            directions: of its objectives, ``minimize`` or ``maximize``.

        Raises:
            ConfigError: the file holds another sweep, or something else.
            ResourceError: it cannot be read or written.
        """
        path, plain = folder / STUDY_FILE, json.loads(json.dumps(asked))
        with reading(path):
            if not path.exists():
                _make(path, plain, directions)
            names = [summary.study_name for summary in optuna.get_all_study_summaries(_storage(path))]
            study = cls(path, names[0]) if len(names) == 1 else None
            found = study.optuna.user_attrs.get(ASKED) if study else None
        if found is None:
            raise ConfigError(f"{path}: holds no sweep; remove the file, or choose another name= or dir=")
        changed = differences(found, plain)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"{path}: holds another sweep ({'; '.join(changed[:3])}{more}); nothing was touched: choose another "
                "name= or dir=, or give the command that it was begun with"
            )
        return study

    def close(self) -> None:
        """Leave the file."""
        self._database.close()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def trials(self) -> dict[str, FrozenTrial]:
        """Arm → its newest trial."""
        found = self.optuna.get_trials(deepcopy=False)
        return {trial.user_attrs["arm"]: trial for trial in found if "arm" in trial.user_attrs}

    def trial(self, arm: str) -> FrozenTrial | None:
        """The newest trial of an arm; None if it was never begun."""
        return self.trials().get(arm)

    def claim(self, arm: str) -> str | None:
        """Take an arm for this process, unless another one that lives has it.

        Returns:
            None: it is not to be had. Otherwise what the one before noted of its run (see `note`), "" for nothing.
        """
        now = time.time()
        values = (arm, self._owner, now, "")
        if self._database.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?, ?)", values).rowcount:
            return ""
        row = self._database.execute("SELECT owner, beat, reference FROM claims WHERE arm = ?", (arm,)).fetchone()
        if row is None or row[0] == self._owner or _lives(row[0], row[1], now):
            return None
        # By its owner and its beat: of two that see it abandoned, one gets it.
        taken = self._database.execute(
            "UPDATE claims SET owner = ?, beat = ? WHERE arm = ? AND owner = ? AND beat = ?",
            (self._owner, now, arm, row[0], row[1]),
        )
        return row[2] if taken.rowcount else None

    def note(self, arm: str, reference: str) -> None:
        """By what the run of an arm that this process has is found again."""
        self._database.execute(
            "UPDATE claims SET reference = ? WHERE arm = ? AND owner = ?", (reference, arm, self._owner)
        )

    def release(self, arm: str) -> None:
        """Give an arm back."""
        self._database.execute("DELETE FROM claims WHERE arm = ? AND owner = ?", (arm, self._owner))

    def beat(self) -> None:
        """Say that this process lives."""
        self._database.execute("UPDATE claims SET beat = ? WHERE owner = ?", (time.time(), self._owner))

    def claimed(self) -> set[str]:
        """Arms that a process has which lives, this one or another."""
        now = time.time()
        rows = self._database.execute("SELECT arm, owner, beat FROM claims").fetchall()
        return {arm for arm, owner, beat in rows if owner == self._owner or _lives(owner, beat, now)}

    def begin(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], facts: Mapping[str, Any]
    ) -> FrozenTrial:
        """A running trial at a given place, with facts to be kept; `arm` is one."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(facts),
        )
        self.optuna.add_trial(trial)
        return self.trials()[facts["arm"]]

    def keep(self, trial: FrozenTrial, **facts: Any) -> None:
        """Keep facts with a trial that has not ended."""
        for name, value in facts.items():
            self._storage.set_trial_user_attr(trial._trial_id, name, value)

    def report(self, trial: FrozenTrial, step: int, value: float) -> None:
        """A figure on the way."""
        self._storage.set_trial_intermediate_value(trial._trial_id, step, value)

    def is_behind(self, trial: FrozenTrial) -> bool:
        """Whether the pruner would stop a trial, by what was reported last."""
        return self.optuna.pruner.prune(self.optuna, self._storage.get_trial(trial._trial_id))

    def end(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        """The trial is over."""
        self.optuna.tell(trial.number, values, state, skip_if_finished=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what SQLite and Optuna say of a file into errors a user reads."""
    try:
        yield
    except (sqlite3.OperationalError, SQLAlchemyError, sqlite3.DatabaseError) as error:
        said = str(getattr(error, "orig", None) or error).splitlines()[0]
        if "not a database" in said or "malformed" in said or "no such" in said:
            raise ConfigError(f"{path}: no study ({said}); remove the file, or choose another name= or dir=") from error
        raise ResourceError(f"{path}: {said}; mend that and run the same command again") from error
    except RuntimeError as error:
        if "version" not in str(error):
            raise
        raise ConfigError(f"{path}: of another version of Optuna; choose another name= or dir=") from error


def _storage(path: Path) -> optuna.storages.RDBStorage:
    # Optuna formats the address.
    name = str(path.absolute()).replace("{", "{{").replace("}", "}}")
    return optuna.storages.RDBStorage(f"sqlite:///{name}", engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}})


def _make(path: Path, asked: Mapping[str, Any], directions: Sequence[str]) -> None:
    """Make a study, whole or not at all; of two processes that do so at once, the first one's stays."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        storage = _storage(beside)
        study = optuna.create_study(storage=storage, study_name=path.parent.name, directions=list(directions))
        study.set_user_attr(ASKED, asked)
        storage.remove_session()
        storage.engine.dispose()
        with contextlib.closing(sqlite3.connect(beside, isolation_level=None)) as database:
            database.execute(_CLAIMS)
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)  # Unlike renaming, it does not replace what another process has put there.
    finally:
        beside.unlink(missing_ok=True)


def _lives(owner: str, beat: float, now: float) -> bool:
    """Whether the process that has an arm lives; of another machine's, whether it was heard of lately."""
    found = alive(owner)
    return now - beat < SILENT_SECONDS if found is None else found
