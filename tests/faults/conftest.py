"""A small run, what happens to it at a step, and places that refuse to be written to."""

import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest

from efficient_lm.training.reporting import read_metrics

MEGABYTE = 1 << 20
CURVE = ("step", "tokens", "loss", "grad_norm", "learning_rate", "final")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    words = ["peace", "union", "congress", "the", "of", "a", "people", "war", "commerce", "treaty"]
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "speeches.jsonl"
    documents = [" ".join(random.choice(words, 60)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def overrides(text):
    """``overrides(folder, **options)`` → a run of twelve steps, with a checkpoint at every fourth."""

    def compose(folder, **options):
        base = {
            "tokenizer": "bytes", "data": "files", "data.source.paths": f"[{text}]", "run.name": "test",
            "run.dir": folder, "model.width": 16, "model.repeats": 2, "mixer.heads": 2, "train.steps": 12,
            "train.batch_size": 4, "train.sequence_length": 32, "train.log_every": 1, "train.evaluate_every": 6,
            "train.checkpoint_every": 4, "train.evaluate_rows": 4,
        }  # fmt: skip
        return [f"{key}={value}" for key, value in {**base, **options}.items()]

    return compose


@pytest.fixture(scope="session")
def train(overrides):
    """``train(folder, **options)`` → the summary."""
    from efficient_lm.config import load_run_config
    from efficient_lm.training import loop

    return lambda folder, **options: loop.train(load_run_config(overrides(folder, **options)))


@pytest.fixture(scope="session")
def curve():
    """``curve(folder)`` → the rows of `metrics.jsonl`, without what depends on the clock."""

    def rows(folder):
        return [
            {name: value for name, value in row.items() if name in CURVE or name.startswith("val_")}
            for row in read_metrics(folder)
            if "rollback" not in row
        ]

    return rows


@pytest.fixture(scope="session")
def whole(train, curve, tmp_path_factory):
    """The rows of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return curve(folder)


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(step, action)``: `action` is carried out once, when that step was begun and the last save is done."""
    from efficient_lm.training.session import Session

    waiting, stepped = {}, Session.stepped

    def watch(session, metrics):
        stepped(session, metrics)
        if session.progress.step in waiting:
            # What was begun before is whole by then, however slow the disk.
            session.checkpoints.wait()
            waiting.pop(session.progress.step)()

    monkeypatch.setattr(Session, "stepped", watch)
    return waiting.__setitem__


class SmallDisk:
    """A file system of four megabytes; where none may be mounted, a folder and a limit on the size of files."""

    def __init__(self, folder):
        self.path = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", folder]
        self.mounted = (
            shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        )
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave=0):
        """Leave so many bytes. Without a mount no file may grow beyond one byte more than that."""
        if not self.mounted:
            self.limit(leave + 1)
            return
        with open(self.path / "filler", "wb", buffering=0) as file:
            for size in (MEGABYTE, 4096, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue
            file.truncate(max(file.tell() - leave, 0))

    def limit(self, size):
        """No file may grow beyond so many bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self._limit[1]))

    def free(self):
        """As much room as in the beginning."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        (self.path / "filler").unlink(missing_ok=True)

    def freeze(self):
        """Nothing can be written any more: the file system is read-only; without a mount, files stay empty."""
        if not self.mounted:
            self.fill()
            return
        for options in (["--bind"], ["-o", "remount,ro,bind"]):
            subprocess.run(["mount", *options, self.path, self.path], check=True)

    def close(self):
        """Take it away."""
        self.free()
        while self.mounted and subprocess.run(["umount", "-l", self.path], capture_output=True).returncode == 0:
            pass

    def thaw(self):
        """Writable again."""
        self.free() if not self.mounted else subprocess.run(["umount", self.path], check=True)


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture
def not_permitted():
    """``not_permitted(folder)``: a context in which this process may not write to a folder."""

    @contextmanager
    def revoke(folder):
        inside = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        modes = {path: path.stat().st_mode for path in inside}
        root = os.geteuid() == 0
        for path in folder.parents[:4] if root else ():
            path.chmod(path.stat().st_mode | 0o055)
        for path in inside:
            path.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode)

    return revoke
