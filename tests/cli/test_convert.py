"""The verb `convert`, as it is typed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.cli.main import main

GOLDENS = Path(__file__).parent.parent / "goldens"


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_there_and_back(tmp_path, capsys):
    source = GOLDENS / "llama"
    assert convert(f"source={source}", f"output={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert convert(f"source={tmp_path / 'run'}", f"output={tmp_path / 'hf'}") == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "M parameters" in capsys.readouterr().out


def test_formats_may_be_named(tmp_path):
    source = GOLDENS / "gemma2"
    assert convert(f"source={source}", f"output={tmp_path / 'half'}", "format=hf", "dtype=float16") == 0
    ids = np.arange(20).reshape(1, 20)
    want, found = elm.from_hf(source).logits(ids), elm.load(tmp_path / "half").logits(ids)
    assert 0 < np.abs(np.asarray(found - want)).max() < 0.1


FAULTS = [
    ((), 2, "source: a value is needed"),
    (("source={golden}", "output={out}", "format=gguf"), 2, "format"),
    (("source={golden}", "output={out}", "dtype=int8"), 2, "dtype"),
    (("source={golden}", "output={out}", "dtype=float16"), 2, "dtype: a run directory holds float32"),
    (("source={golden}", "output={golden}"), 4, "already holds something"),
    (("source={out}/missing", "output={out}"), 4, "neither a run directory"),
    (("source={pickle}", "output={out}"), 4, "a pickle"),
    (("source={torn}", "output={out}"), 4, "truncated"),
    (("source={golden}/config.json", "output={out}"), 4, "config.json"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), FAULTS)
def test_faults_have_their_status_and_leave_nothing(tmp_path, capsys, arguments, status, message):
    pickled, torn = tmp_path / "pickle", tmp_path / "torn"
    for folder in (pickled, torn):
        shutil.copytree(GOLDENS / "llama", folder, copy_function=shutil.copy)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    places = {"golden": GOLDENS / "llama", "out": tmp_path / "out", "pickle": pickled, "torn": torn}
    assert convert(*(argument.format(**places) for argument in arguments)) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
