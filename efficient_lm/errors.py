"""Errors a user reads: one or two lines saying what is wrong, where, and what is valid; each has its exit status."""

import difflib
import errno
import os
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
    """Not enough disk or memory, or a disk that cannot be written to."""

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


_STORAGE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a limit on the size of files is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EIO: "the disk failed (input/output error)",
    errno.ESTALE: "the file server lost it (stale file handle)",
}


def storage_fault(error: BaseException) -> str | None:
    """What a disk refused, if an exception or one it came from says so: ``the disk is full``, ``permission denied``."""
    for cause in causes(error):
        text = str(cause)
        for code, fault in _STORAGE.items():
            if getattr(cause, "errno", None) == code or os.strerror(code) in text:
                return fault
    return None
