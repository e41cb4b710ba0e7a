"""Tokens of the environment and passwords in URLs are in no file of a run and in nothing that it prints."""

import os
import subprocess
import sys

import pytest

from efficient_lm.config import load_run_config
from efficient_lm.errors import ConfigError
from efficient_lm.private import refuse_secrets

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPl",
    "HUGGING_FACE_HUB_TOKEN": "hf_otherOtherOtherOtherOtherOther",
    "AWS_SECRET_ACCESS_KEY": "plantedSecretOfAmazonPlantedSecret00",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_token_of_the_environment_cannot_be_a_value(run, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, PLANTED[name])
    for key in ("tracker.group", "run.name", "model.layout.0", "train.freeze.0"):
        value = f"${{oc.env:{name}}}" if key != "run.name" else f"x-{PLANTED[name]}"
        given = ["tracker=wandb", "train.freeze=[a]", f"{key}='{value}'", f"run.dir={tmp_path / 'run'}"]
        status, printed, said = run("train", *given)
        assert status == 2 and f"{key}: holds the value of {name}" in said
        assert PLANTED[name] not in printed + said and not (tmp_path / "run").exists()


def test_a_url_with_a_password_cannot_be_a_value(run):
    status, _, said = run("train", "data=files", "data.source.paths=['https://me:hunter2222@host/a.txt']")
    assert status == 2 and said.startswith("error: data.source.paths.0: a URL with a password")
    assert "hunter2222" not in said


def test_ordinary_values_are_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "run")
    monkeypatch.setenv("NOT_ONE", "sotu_bpe")
    load_run_config([f"run.dir={tmp_path / 'run'}", "data=files", "data.source.paths=['https://host:80/a@b']"])
    with pytest.raises(ConfigError, match="a: a URL"):
        refuse_secrets({"a": "s3://key:secret@bucket"})


@pytest.mark.slow
def test_a_tracked_run_keeps_no_token(tmp_path):
    """About half a minute: a process, and W&B's own beside it."""
    repository = tmp_path / "repository"
    repository.mkdir()
    remote = "https://someone:ghp_plantedPlanted@example.org/a.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    folder = tmp_path / "run"
    given = [
        "model.width=16", "model.repeats=1", "mixer.heads=2", "data=parity", "train.steps=2",
        "train.batch_size=2", "tracker=wandb", "tracker.mode=offline", f"run.dir={folder}",
    ]  # fmt: skip
    environment = os.environ | PLANTED | {"HOME": str(tmp_path)}
    for arguments in (["train", *given], ["train", *given, "train.batch_size=0", "--traceback"]):
        done = subprocess.run([sys.executable, "-m", "efficient_lm", *arguments],
                              cwd=repository, env=environment, capture_output=True, check=False)  # fmt: skip
        assert done.returncode == (2 if "--traceback" in arguments else 0), done.stderr.decode()[-1500:]
        contents = {"stdout": done.stdout, "stderr": done.stderr}
        contents |= {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert any(name.endswith(".wandb") for name in contents)
        for secret in (*PLANTED.values(), "ghp_plantedPlanted"):
            assert [name for name, content in contents.items() if secret.encode() in content] == []
