"""Disks that refuse while a run goes on: what was saved stays, and the same command ends with the same rows."""

from contextlib import ExitStack

import pytest

from efficient_lm.errors import ResourceError
from efficient_lm.training import checkpoints
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.reporting import MetricsFile, read_metrics

REFUSED = r"(the disk is full|a limit on the size of files is reached)"


def goes_on(train, folder, curve, whole):
    assert train(folder)["step"] == 12
    assert curve(folder) == whole
    assert Checkpoints(folder / "checkpoints").steps == [4, 8, 12]


def test_full_in_the_midst_of_a_save(train, curve, whole, small_disk, at_step, monkeypatch):
    folder = small_disk.path / "run"
    monkeypatch.setattr(checkpoints, "HEADROOM", 0.0)
    at_step(6, lambda: small_disk.fill(leave=20_000))
    with pytest.raises(ResourceError, match=f"saving failed: {REFUSED}; the newest good checkpoint is 4") as error:
        train(folder)
    assert error.value.status == 6
    small_disk.free()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"4"}
    goes_on(train, folder, curve, whole)


@pytest.mark.slow
def test_full_before_a_save(train, curve, whole, small_disk, at_step):
    folder = small_disk.path / "run"
    at_step(6, lambda: small_disk.fill(leave=20_000))
    expected = "a checkpoint needs" if small_disk.mounted else REFUSED
    with pytest.raises(ResourceError, match=f"{expected}.*; the newest good checkpoint is 4"):
        train(folder)
    small_disk.free()
    goes_on(train, folder, curve, whole)


def test_rows_wait_until_there_is_room(train, curve, whole, small_disk, at_step, caplog):
    folder = small_disk.path / "run"
    seen = []
    at_step(3, lambda: small_disk.limit((folder / "metrics.jsonl").stat().st_size + 100))
    at_step(11, lambda: (seen.append(len(read_metrics(folder))), small_disk.free()))
    assert train(folder, **{"train.checkpoint_every": 99})["step"] == 12
    assert seen[0] < 11 and curve(folder) == whole
    assert caplog.text.count("training goes on, and rows wait in memory") == 1


def test_no_checkpoint_is_ahead_of_its_rows(tmp_path, small_disk):
    metrics = MetricsFile(small_disk.path)
    metrics.append({"step": 1})
    small_disk.fill()
    metrics.append({"step": 2, "long": "x" * 9000})
    with pytest.raises(ResourceError, match=f"metrics.jsonl: cannot be written: {REFUSED}"):
        metrics.settle()
    small_disk.free()
    metrics.append({"step": 3})
    assert [row["step"] for row in read_metrics(small_disk.path)] == [1, 2, 3]


@pytest.mark.slow
def test_read_only(train, curve, whole, small_disk, at_step):
    folder = small_disk.path / "run"
    at_step(6, small_disk.freeze)
    fault = "the file system is read-only" if small_disk.mounted else REFUSED
    with pytest.raises(ResourceError, match=f"{fault}; the newest good checkpoint is 4"):
        train(folder)
    if small_disk.mounted:
        with pytest.raises(ResourceError, match="run.dir: cannot write to .*: the file system is read-only"):
            train(folder)
    small_disk.thaw()
    goes_on(train, folder, curve, whole)


@pytest.mark.slow
def test_permission_lost(train, curve, whole, tmp_path, at_step, not_permitted):
    folder = tmp_path / "run"
    with ExitStack() as later:
        at_step(7, lambda: later.enter_context(not_permitted(folder)))
        with pytest.raises(ResourceError, match="permission denied; the newest good checkpoint is 4"):
            train(folder)
    goes_on(train, folder, curve, whole)
