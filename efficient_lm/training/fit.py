"""Whether what a checkpoint holds beside the parameters is what an optimizer expects."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.errors import CheckpointError

STATE = "optimizer"
"""The item of a checkpoint that holds everything of the state but the parameters."""


def check_state(where: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer, or none, before it is read.

    Args:
        where: the checkpoint's folder.
        saved: per item, a tree whose leaves have the shapes and dtypes that were saved.
        expected: per item, a tree whose leaves have those that are asked for.

    Raises:
        CheckpointError: names the first array that differs, and what to do.
        ValueError: the checkpoint has the item, but what is in it cannot be told.
    """
    if STATE not in expected:
        return
    if STATE not in saved:
        if (where / STATE).exists():
            raise ValueError(f"{STATE}/ cannot be read")
        raise CheckpointError(f"{where}: holds parameters alone, so nothing goes on from there; {_instead(where)}")
    found, wanted = _leaves(saved[STATE]), _leaves(expected[STATE])
    for name in sorted(set(found) | set(wanted)):
        if not _fits(found.get(name), wanted.get(name)):
            shown = [_shown(leaf.get(name)) for leaf in (found, wanted)]
            raise CheckpointError(
                f"{where}: is the state of another optimizer: '{name}' is {shown[0]} in the checkpoint and {shown[1]} "
                f"in the config; keep the optimizer and what it trains, or {_instead(where)}"
            )


def _instead(where: Path) -> str:
    return f"begin a new run with the parameters: init_from={where} and another run.name"


def _leaves(tree: Any) -> dict[str, Any]:
    return {".".join(map(_name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(step: Any) -> str:
    """A step of a path, whether of a dict, of a named tuple, or of a sequence."""
    return str(next(getattr(step, name) for name in ("key", "name", "idx") if hasattr(step, name)))


def _fits(found: Any, wanted: Any) -> bool:
    """Of the same shape and the same kind of number: moments of another precision are rounded when they are read."""
    if found is None or wanted is None or tuple(found.shape) != tuple(wanted.shape):
        return False
    whole = [np.issubdtype(leaf.dtype, np.integer) for leaf in (found, wanted)]
    return whole[0] == whole[1]


def _shown(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
