"""Manifests: the size and SHA-256 of every file of a folder, by which damage is found and named."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
ALGORITHM = "sha256"
WRITING_THREADS = 2
"""Few, for training goes on meanwhile."""


def write_manifest(folder: Path) -> None:
    """Note every file of a folder in its `manifest.json`; all of it is on disk when this returns.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = _files(folder)
    with ThreadPoolExecutor(WRITING_THREADS) as threads:
        digests = threads.map(lambda name: _digest(folder / name, settle=True), files)
        entries = {name: [size, digest] for (name, size), digest in zip(files.items(), digests, strict=True)}
    content = {"algorithm": ALGORITHM, "digest": _of_entries(entries), "files": entries}
    with open(folder / NAME, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=0))
        file.flush()
        os.fsync(file.fileno())
    for inner, _, _ in os.walk(folder):
        settle_folder(Path(inner))


def damage(folder: Path, parts: Iterable[str] | None = None, contents: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest, or None.

    Args:
        parts: folders inside to look at, besides the files that lie in none; all by default.
        contents: whether to read the files; otherwise only their sizes are compared.

    Raises:
        PermissionError: a file may not be read, which says nothing about what it holds.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        entries = content["files"]
        if content["algorithm"] != ALGORITHM or content["digest"] != _of_entries(entries):
            return f"{NAME} does not hold what was written"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{NAME} cannot be read"
    if parts is not None:
        chosen = set(parts)
        entries = {name: entry for name, entry in entries.items() if "/" not in name or name.split("/")[0] in chosen}
    found = _files(folder)
    for name, (size, _) in entries.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes instead of {size:,}"
    return _changed(folder, entries) if contents else None


def signature(folder: Path) -> tuple:
    """What is the same as long as nobody touched a file of the folder: cheap to ask again."""
    facts = {name: (folder / name).lstat() for name in sorted([*_files(folder), NAME])}
    return tuple((name, fact.st_ino, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns) for name, fact in facts.items())


def settle_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _changed(folder: Path, entries: dict[str, list]) -> str | None:
    """The first file that cannot be read, or whose bytes are others than were written."""

    def wrong(name: str) -> str | None:
        try:
            same = _digest(folder / name) == entries[name][1]
        except PermissionError:
            raise
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} does not hold what was written"

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return next(filter(None, threads.map(wrong, entries)), None)


def _digest(path: Path, settle: bool = False) -> str:
    with open(path, "rb") as file:
        if settle:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def _of_entries(entries: dict[str, list]) -> str:
    return hashlib.new(ALGORITHM, json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, int]:
    """Sizes of the files in a folder and below, by their names in it; links are no files, nor is the manifest."""
    paths = [Path(inner) / name for inner, _, names in os.walk(folder) for name in names]
    facts = {path.relative_to(folder).as_posix(): path.lstat() for path in paths}
    return {name: fact.st_size for name, fact in sorted(facts.items()) if stat.S_ISREG(fact.st_mode) and name != NAME}
