"""Where text for people goes. Imports no jax."""

import sys

import rich.console


def console(stderr: bool = False, **options: bool | int) -> rich.console.Console:
    """Rich's console, animated and in colour only where a terminal shows it.

    Notebooks ask programs for colour (`FORCE_COLOR`, which Rich takes for a terminal), and keep every frame of what
    moves; in their own process Rich would make a table of HTML of every line.

    Args:
        stderr: whether it is that of faults, in place of stdout.
        options: of `rich.console.Console`.
    """
    stream = sys.stderr if stderr else sys.stdout
    return rich.console.Console(stderr=stderr, force_terminal=stream.isatty(), force_jupyter=False, **options)
