"""What is drawn for people: only where a terminal shows it."""

import rich.console

from efficient_lm.terminal import console


def test_a_notebook_that_asks_for_colour_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert rich.console.Console().is_terminal
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert rich.console.Console().is_jupyter and not console().is_jupyter
    assert not console().is_terminal and not console(stderr=True, highlight=False).is_terminal


def test_a_terminal_is_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert console(width=70).is_terminal and console(width=70).width == 70 and not console(stderr=True).is_terminal
