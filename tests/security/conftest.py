"""What tests of malicious files share: a published model and a run to spoil, a canary, and the command line."""

import pickle
import shutil
from pathlib import Path

import pytest

import efficient_lm as elm
from efficient_lm.cli import main as cli
from efficient_lm.data.tokenizers import ByteTokenizer

GOLDEN = Path(__file__).parent.parent / "goldens" / "llama"


@pytest.fixture(autouse=True)
def own_process_settings(monkeypatch, tmp_path):
    """What the command line sets for its process is none of the other tests' business."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def canary(tmp_path):
    """A file that is there as soon as something was executed."""
    return tmp_path / "executed"


@pytest.fixture
def payload(canary):
    """A pickle that makes the canary when it is read."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (canary,))

    return pickle.dumps(Payload())


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder in Hugging Face format, with a tokenizer."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    for name, content in ByteTokenizer().published_files(begins=False).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A run directory."""
    return elm.from_hf(GOLDEN).save(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def downloaded(made, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(made, tmp_path / "downloaded"))
