"""Errors a user reads: one or two lines saying what is wrong, where, and what is valid; each has its exit status."""

import difflib
import errno
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A fault the user can mend. The command line prints its text without a traceback and exits with `status`."""

    status = 1


class ConfigError(UserError):
    """A key, kind, type or combination of settings that is not valid."""

    status = 2


class DataError(UserError):
    """A corpus, tokenizer or text file that is missing or malformed."""

    status = 3


class CheckpointError(UserError):
    """A checkpoint or run directory that is missing, torn, in use, or of another architecture."""

    status = 4


class DivergedError(UserError):
    """Training whose loss stopped being a number."""

    status = 5


class ResourceError(UserError):
    """Not enough disk or memory."""

    status = 6


def nearest(name: object, valid: Iterable[object], limit: int = 12) -> str:
    """Say which valid names there are, the closest to `name` first: ``did you mean 'heads'? valid: heads, ...``."""
    names = sorted(str(choice) for choice in valid)
    if not names:
        return "nothing is valid here"
    close = difflib.get_close_matches(str(name), names, n=len(names), cutoff=0.6)
    ordered = close + [choice for choice in names if choice not in close]
    shown = ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
    return f"did you mean '{close[0]}'? valid: {shown}" if close else f"valid: {shown}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from, the newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one it came from, says that no space or quota is left."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(getattr(cause, "errno", None) in full or "No space left" in str(cause) for cause in causes(error))
