"""A checkpoint goes on anywhere: on other devices, on another mesh, in pieces, in another run; what changed is said."""

import json
import shutil

import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.training.loop import train
from efficient_lm.training.reporting import read_metrics

PLACES = {
    "all": (
        "parallelism.mesh={data: 2, fsdp: 2, tensor: 2}",
        "parallelism.rules={embed: fsdp, mlp: tensor, heads: tensor}",
    ),
    "fsdp": ("parallelism.mesh={fsdp: 8}", "parallelism.rules={embed: fsdp}"),
    "tensor": ("parallelism.mesh={data: 2, tensor: 4}", "parallelism.rules={mlp: tensor, heads: tensor}"),
    "expert": ("parallelism.mesh={data: 2, expert: 4}", "parallelism.rules={experts: expert}"),
    "four": ("parallelism.mesh={fsdp: 4}", "parallelism.rules={embed: fsdp}"),
}
EXPERTS = ("ffn=moe", "ffn.experts=4", "ffn.top_k=2")
HYBRID = (
    "model=mamba2_hybrid_tiny", "model.width=32", "model.layout=[mamba2,attend,mlp]",
    "model.blocks.attend.mixer.heads=4", "model.blocks.mamba2.mixer.state_size=8",
    "model.blocks.mamba2.mixer.head_size=8",
)  # fmt: skip
NESTED = ("nesting=joint", "model.elastic={ffn: [0.5, 1]}", "ffn=swiglu", "ffn.hidden=16")
UNIFORM = ("model.width=16", "model.repeats=2", "mixer.heads=4")
ELSEWHERE = """
    import logging, sys
    from efficient_lm.config import load_run_config
    from efficient_lm.training.loop import train
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s", force=True)
    for keys in {runs!r}:
        train(load_run_config(keys))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = ["peace", "union", "congress", "the", "of", "a", "people", "war", "commerce", "treaty"]
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "speeches.jsonl"
    documents = (" ".join(rng.choice(words, rng.integers(3, 20))) for _ in range(80))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def keys(text):
    """``keys(folder, ...)`` → those of a run of nine steps on packed text; nothing is held out."""

    def keys(folder, *more):
        return [
            "tokenizer=bytes", "data=files", f"data.source.paths=[{text}]", "data.holdout_every=null",
            "data.packing=first_fit", "run.name=test", f"run.dir={folder}", "train.steps=9", "train.batch_size=8",
            "train.sequence_length=32", "train.log_every=1", "train.checkpoint_every=3", *more,
        ]  # fmt: skip

    return keys


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """A run of a mixture of experts in one go, on one device."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(load_run_config(keys(folder, *UNIFORM, *EXPERTS)))
    return folder


def losses(folder):
    return np.array([(row["step"], row["tokens"], row["loss"]) for row in read_metrics(folder) if "loss" in row])


def at_step(source, folder, step):
    """A copy of a run as if it had been stopped after a step."""
    shutil.copytree(source, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.is_dir() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return folder


def test_from_one_device_to_eight_and_back(keys, whole, tmp_path, on_devices):
    """Its parameters divided, its batches too, and back to one device with a batch in pieces: the same losses."""
    model = (*UNIFORM, *EXPERTS)
    folder = at_step(whole, tmp_path / "moved", 3)
    runs = [keys(folder, *model, *PLACES["all"], "train.stop_at=6")]
    said = on_devices(8, ELSEWHERE.format(runs=runs))
    assert (
        "going on with 8 devices (data 2 × fsdp 2 × tensor 2); the checkpoint was saved with 1 device (data 1)" in said
    )
    assert "learning rate" not in said and "training data" not in said
    np.testing.assert_allclose(losses(folder), losses(whole)[:6], rtol=1e-5)
    record = json.loads((folder / "checkpoints" / "6" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert record["layout"]["devices"] == 8 and record["layout"]["processes"] == 1
    train(load_run_config(keys(folder, *model, "train.accumulate=2")))
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "place"),
    [
        ((*UNIFORM, *EXPERTS), "expert"),
        (UNIFORM, "fsdp"),
        (HYBRID, "tensor"),
        ((*UNIFORM, *NESTED), "tensor"),
    ],
)
def test_from_one_device_to_eight_to_four(keys, tmp_path, on_devices, model, place):
    whole = tmp_path / "whole"
    train(load_run_config(keys(whole, *model)))
    folder = at_step(whole, tmp_path / "moved", 3)
    on_devices(8, ELSEWHERE.format(runs=[keys(folder, *model, *PLACES[place], "train.stop_at=6")]))
    on_devices(4, ELSEWHERE.format(runs=[keys(folder, *model, *PLACES["four"])]))
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)


def test_stopping_at_a_step_keeps_the_schedule(keys, whole, tmp_path):
    folder = tmp_path / "stopped"
    summary = train(load_run_config(keys(folder, *UNIFORM, *EXPERTS, "train.stop_at=3")))
    assert (summary["step"], summary["stopped_by"]) == (3, "train.stop_at")
    np.testing.assert_array_equal(losses(folder), losses(whole)[:3])


def test_a_run_branches_off_another(keys, whole, tmp_path, caplog):
    """Its config, optimizer, step and place in the data are the other's; where it began, it begins again."""
    folder = tmp_path / "branch"
    begun = (f"init_from={whole}/checkpoints/6", "init_state=all", f"run.dir={folder}")
    train(load_run_config([*begun, "train.stop_at=7", "optimizer.learning_rate=5e-4"]))
    assert f"branching off {whole} from step 6" in caplog.text
    assert "the learning rate of the next step would have been" in caplog.text
    assert (folder / "checkpoints" / "6").is_dir()
    np.testing.assert_array_equal(losses(folder), losses(whole)[6:7])
    caplog.clear()
    assert train(load_run_config([*begun, "optimizer.learning_rate=5e-4"]))["step"] == 9
    assert f"resuming {folder} from step 7" in caplog.text
    assert losses(folder)[-1, 2] != losses(whole)[-1, 2]


def test_what_cannot_branch_off(keys, whole, tmp_path):
    def refused(error, words, *more):
        with pytest.raises(error, match=words):
            train(load_run_config([f"run.dir={tmp_path / 'never'}", "init_state=all", *more]))
        assert not (tmp_path / "never" / "config.yaml").exists()

    source = f"init_from={whole}"
    refused(ConfigError, "init_state: all that a run had is taken, but init_from names no run")
    refused(ConfigError, r"train.steps: 9, but .* has done 9, and with init_state=all", source)
    refused(ConfigError, "'embed' may not change", source, "model.width=32", "train.steps=12")
    refused(CheckpointError, "another architecture.*init_state=parameters", source, "model.repeats=3", "train.steps=12")
    refused(CheckpointError, "no checkpoint of step 5; there are 3, 6, 9", f"{source}/checkpoints/5")
    frozen = (source, "train.steps=12", "train.freeze=[embedding]")
    refused(CheckpointError, "another optimizer: .*init_from=.*/9 and another run.name", *frozen)


def test_changed_data_and_batches_are_said(keys, whole, text, tmp_path, caplog):
    folder = at_step(whole, tmp_path / "moved", 6)
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text())
    model = (*UNIFORM, *EXPERTS, "train.stop_at=6")
    train(load_run_config(keys(folder, *model, f"data.source.paths=[{other}]")))
    assert "going on with a changed config: data.source.paths" in caplog.text
    assert "training data is not what" not in caplog.text, "the same text elsewhere is the same data"
    other.write_text(text.read_text().replace("peace", "truce"))
    train(load_run_config(keys(folder, *model, f"data.source.paths=[{other}]", "train.batch_size=4")))
    assert "the training data is not what the checkpoint was trained on" in caplog.text
    assert "the data goes on at row 24," in caplog.text and "48 rows were seen, so the last 24 come" in caplog.text
