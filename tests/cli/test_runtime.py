"""Where compiled programs are kept."""

import logging
import os
import sys

import pytest

from efficient_lm import runtime


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "EFFICIENT_LM_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_compiled_programs_are_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / ".cache/efficient_lm/compile")


def test_the_root_of_the_cache_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "mine"))
    runtime.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine/compile")


def test_what_the_user_set_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path))
    runtime.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere" and os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_means_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path / "file"))
    runtime.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_messages_follow_stderr(capsys, monkeypatch):
    handler = runtime._Stderr()
    record = logging.LogRecord("efficient_lm", logging.INFO, "", 1, "said %s", ("this",), None)
    handler.emit(record)
    assert capsys.readouterr().err == "said this\n"
    assert handler.stream is sys.stderr
