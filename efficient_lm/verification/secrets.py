"""Whether the text files of a folder hold keys or tokens; what is found is named by its kind, never shown."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from efficient_lm.private import NAMED, SHORTEST
from efficient_lm.verification.findings import Finding, State

LARGEST = 64 << 20
"""Bytes of a file; what is larger holds arrays."""

KINDS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a W&B key": rb"(?i:(?:wandb|api)[_-]?(?:api)?[_-]?key)\W{1,6}[0-9a-f]{40}\b|\bwandb_v\d_[A-Za-z0-9_]{30,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": rb"[a-z]{2,10}://[^\s/:@'\"]+:[^\s/:@'\"]+@",
}
PATTERN = re.compile(b"|".join(b"(%s)" % pattern for pattern in KINDS.values()))


def secrets_in(folder: Path) -> Iterator[Finding]:
    """A fault for each file that has one; the values of this process's own secret variables are looked for too."""
    own = {name: value.encode() for name, value in os.environ.items() if _is_secret(name, value)}
    looked = 0
    clean = True
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST:
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            yield Finding("secrets", State.WARNING, f"{path.relative_to(folder)}: cannot be read: {error.strerror}")
            continue
        looked += 1
        held = _held(content, own)
        if held is not None:
            clean = False
            yield Finding("secrets", State.FAULT, f"{path.relative_to(folder)} holds {held}: revoke it, then delete it")
    if clean:
        yield Finding("secrets", State.OK, f"none in {looked:,} files")


def _is_secret(name: str, value: str) -> bool:
    return bool(NAMED.search(name)) and len(value) >= SHORTEST and not value.startswith(("/", ".", "~"))


def _held(content: bytes, own: dict[str, bytes]) -> str | None:
    for name, value in own.items():
        if value in content:
            return f"the value of {name}"
    # Of arrays any bytes may come by chance, but no long run of text.
    if b"\0" in content[:4096]:
        return None
    match = PATTERN.search(content)
    return None if match is None else list(KINDS)[_group(match)]


def _group(match: re.Match[bytes]) -> int:
    return next(number for number, text in enumerate(match.groups()) if text is not None)
