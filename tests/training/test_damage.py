"""Checkpoints that something damaged: each file is missed, the newest good one is found, and the last one stays."""

import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from efficient_lm.errors import CheckpointError
from efficient_lm.training import checkpoints as module
from efficient_lm.training import manifests
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.retention import Retention


def items(step):
    return {
        "parameters": {"a": {"w": jnp.full((64, 32), step, jnp.float32)}, "b": jnp.arange(5.0)},
        "optimizer": {"step": jnp.int32(step), "moments": (jnp.ones(3),)},
    }


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), items(0))


def save(folder, *steps, retention=None, **record):
    checkpoints = Checkpoints(folder, retention or Retention(9))
    for step in steps:
        checkpoints.save(step, items(step), {"step": step, **record})
    checkpoints.close()
    return checkpoints


def restored(folder):
    """The step that is found, by a reader, whose values are then those that were saved with it."""
    found, record = Checkpoints(folder).restore(ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, found, items(record["step"]))
    return record["step"]


def flip(path):
    content = bytearray(path.read_bytes()) or bytearray(1)
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    size = path.stat().st_size
    os.truncate(path, size // 2 if size > 1 else size + 1)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


DAMAGES = {"flipped": flip, "truncated": truncate, "lost": os.remove}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_is_found_and_the_file_named(tmp_path, caplog, damage):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    shutil.copytree(folder / "2", tmp_path / "good")
    paths = files(folder / "2")
    assert len(paths) > 15 and {manifests.NAME, "_CHECKPOINT_METADATA"} <= {path.name for path in paths}
    for path in paths:
        damage(path)
        caplog.clear()
        assert restored(folder) == 1
        name = path.relative_to(folder / "2").as_posix()
        assert f"checkpoint {folder / '2'} is damaged ({name} " in caplog.text, name
        assert manifests.damage(folder / "2").startswith(name)
        shutil.copyfile(tmp_path / "good" / name, path)
    assert restored(folder) == 2


def test_readers_change_nothing_and_look_only_at_what_they_read(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    for path in files(folder / "2" / "optimizer"):
        flip(path)
    before = files(tmp_path)
    assert restored(folder) == 1
    reader = Checkpoints(folder)
    assert reader.restore({"parameters": ABSTRACT["parameters"]})[1]["step"] == 2
    assert files(tmp_path) == before


def test_where_nothing_is_good_nothing_is_touched(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    for step in (1, 2):
        flip(folder / str(step) / "_CHECKPOINT_METADATA")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2\] can be read"):
        Checkpoints(folder, Retention(1)).restore(ABSTRACT)
    assert files(tmp_path) == before


def test_checkpoints_from_before_there_were_manifests(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    old = ocp.training.Checkpointer(folder)
    for step in (1, 2):
        record = {"step": step, "shapes": module._shapes(items(step)["parameters"])}
        old.save_checkpointables(step, items(step), force=True, custom_metadata=record)
    old.close()
    assert restored(folder) == 2
    for path in files(folder / "2" / "parameters"):
        truncate(path)
    assert restored(folder) == 1 and f"{folder / '2'} is damaged" in caplog.text


def test_what_a_reader_may_not_see_or_has_no_memory_for_is_not_damaged(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    secret = folder / "2" / "parameters" / "manifest.ocdbt"
    secret.chmod(0)
    root = os.geteuid() == 0
    for place in [*tmp_path.parents[:3], tmp_path] if root else []:
        place.chmod(place.stat().st_mode | 0o055)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"manifest.ocdbt: permission denied"):
            Checkpoints(folder).restore(ABSTRACT)
    finally:
        if root:
            os.seteuid(0)

    def too_large(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(module.ocp, "load_checkpointables", too_large)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        Checkpoints(folder).restore(ABSTRACT)


def test_what_a_killed_process_left_is_cleared_by_the_run_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    for left in (folder / "unfinished" / "2" / "parameters", folder / "2.orbax-checkpoint-tmp-7"):
        left.mkdir(parents=True)
    assert restored(folder) == 1 and (folder / "unfinished").is_dir()
    assert save(folder, 2).steps == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_which_checkpoints_are_kept():
    steps = [100, 200, 250, 300, 400]
    assert Retention(2).kept(steps, {}) == {300, 400}
    assert Retention(1, every=200).kept(steps, {}) == {200, 400}
    assert Retention(1, best=2).kept(steps, {100: 3.0, 200: 2.0, 300: 2.0, 400: 4.0}) == {200, 300, 400}


def test_the_best_by_validation_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 4.0)):
        save(folder, step, retention=Retention(1, best=1), val_loss=loss)
    assert Checkpoints(folder).steps == [2, 4]


def test_damaged_ones_are_set_aside_and_do_not_count_as_kept(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    truncate(max(files(folder / "2"), key=lambda path: path.stat().st_size))
    (tmp_path / "damaged_checkpoint_2").mkdir()
    assert save(folder, 3, retention=Retention(2)).steps == [1, 3]
    assert f"{folder / '2'} is damaged" in caplog.text and (tmp_path / "damaged_checkpoint_2_1" / "parameters").is_dir()


def test_the_last_good_one_is_never_deleted(tmp_path, caplog, monkeypatch):
    """A disk that garbles what it took: each file of each save is damaged as soon as it has its name."""
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2, retention=Retention(2))
    settle = manifests.settle_folder

    def garble(place):
        settle(place)
        if place == folder:
            flip(folder / str(max(checkpoints.steps)) / "parameters" / "manifest.ocdbt")

    monkeypatch.setattr(manifests, "settle_folder", garble)
    caplog.set_level(logging.WARNING)
    checkpoints = Checkpoints(folder, Retention(2))
    for step in (3, 4, 5):
        checkpoints.save(step, items(step), {"step": step})
    checkpoints.close()
    assert 2 in checkpoints.steps and restored(folder) == 2
    assert {path.name for path in tmp_path.glob("damaged*")} >= {"damaged_checkpoint_3", "damaged_checkpoint_4"}
