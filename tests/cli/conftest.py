"""What tests of the command line share: a process left as it was, a text, and runs trained on it."""

import json
from contextlib import contextmanager

import pytest

from efficient_lm.cli import main as cli


@contextmanager
def _own_settings(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        patch.setattr(cli, "configure_logging", lambda: None)
        patch.setenv("EFFICIENT_LM_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The token cache of these tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def own_process_settings(cache):
    """What the command line sets for its process is none of the other tests' business."""
    with _own_settings(cache):
        yield


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
    """A text of 40 lines."""
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    lines = [{"text": f"{number} and {number * number} are numbers"} for number in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def on_numbers(numbers):
    """Keys of a model of two layers, and of its short training on that text."""
    model = ["model.width=16", "model.repeats=2", "mixer.heads=2", "ffn.hidden=32", "tokenizer=bytes"]
    short = ["train.steps=3", "train.batch_size=2", "train.sequence_length=32"]
    return [*model, *short, "data=files", f"data.source.paths={numbers}", "data.holdout_every=4"]


def _trained(folder, cache, *keys):
    with _own_settings(cache):
        assert cli.main(["train", *keys, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def plain(on_numbers, cache, tmp_path_factory):
    """A run of a plainly trained model, to be read only."""
    return _trained(tmp_path_factory.mktemp("runs") / "plain", cache, *on_numbers)


@pytest.fixture(scope="session")
def nested(on_numbers, cache, tmp_path_factory):
    """A run of a model trained for an eighth, a quarter and half of its ffns too, to be read only."""
    return _trained(tmp_path_factory.mktemp("runs") / "nested", cache, *on_numbers, "nesting=sample")
