"""Reading files that may come from anyone: regular, bounded in size, inside their folder, and never code.

The one door for YAML and JSON of run directories, checkpoints, published models and tokenizers. What is read is data:
no tag of YAML makes an object, no alias multiplies a value, an interpolation such as ``${oc.env:HOME}`` stays text, and
nothing is unpickled. Imports neither jax nor any spec.
"""

import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from efficient_lm.errors import CheckpointError, UserError

CONFIG_BYTES = 1 << 20
"""Of a YAML file; configs of the largest models have some hundred thousand."""
JSON_BYTES = 1 << 26
"""Of a JSON file; the index of a model of a hundred thousand tensors has 10 MB."""
TOKENIZER_BYTES = 1 << 27
"""Of a file of a tokenizer; vocabularies of 262,144 entries have 34 MB."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Endings of weights that are pickles."""
_PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""Of torch's archives, and of pickles by themselves."""


def inside(folder: Path, name: str, fault: type[UserError] = CheckpointError, said_by: str = "") -> Path:
    """The file of that name in a folder.

    A link may lead anywhere in the folder, and from a snapshot of Hugging Face's cache to the `blobs` beside it.

    Args:
        said_by: the file that names it, for messages.

    Raises:
        UserError: of class `fault`, for a name with a folder in it, and for a link that leads out.
    """
    place = f"{folder / said_by}: " if said_by else f"{folder}: "
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise fault(f"{place}'{name[:80]}' is no name of a file beside it; paths are not followed")
    path = folder / name
    if path.is_symlink() and not _stays(path.resolve(), folder):
        raise fault(f"{path}: a link that leads out of its folder; it is not followed")
    return path


def _stays(target: Path, folder: Path) -> bool:
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(target.is_relative_to(each) for each in homes)


def read_bytes(path: Path, most: int, fault: type[UserError] = CheckpointError) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be opened or read.
        UserError: of class `fault`, for a larger one, and for a device, pipe or socket.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise IsADirectoryError(21, "Is a directory") if path.is_dir() else fault(f"{path}: not a regular file")
    content = b""
    if path.stat().st_size <= most:
        with path.open("rb") as file:
            content = file.read()
    if max(len(content), path.stat().st_size) > most:
        raise fault(f"{path}: larger than {most:,} bytes, which nothing of its kind is; it is not read")
    return content


def parse_json(content: str | bytes) -> Any:
    """A JSON value. Raises `ValueError` for anything else, and for values nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_yaml(content: str | bytes) -> Any:
    """Plain mappings, lists and scalars of a YAML document; ``1e-3`` is a number, as Hydra reads it.

    Raises:
        yaml.YAMLError: not YAML, or with tags, aliases, keys given twice, or values nested too deeply.
    """
    try:
        return yaml.load(content, _PlainLoader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags and aliases."""

    def fetch_tag(self) -> None:
        mark = self.get_mark()
        text = self.prefix(48).split()[0]
        raise yaml.scanner.ScannerError(None, None, f"the tag '{text}': tags are refused, for they can run code", mark)

    def fetch_alias(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "an alias: a value is written out where it stands", self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
            if key.value in given:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' comes twice", key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
               r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip
# Dates stay text, and `<<` is a key like others.
_PlainLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")]
    for first, pairs in _PlainLoader.yaml_implicit_resolvers.items()
}


class _PlainDumper(yaml.SafeDumper):
    """YAML that `_PlainLoader` reads back: text that would be read as something else is quoted."""

    yaml_implicit_resolvers = _PlainLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(values: Any) -> str:
    """Plain mappings, lists and scalars as YAML that `parse_yaml` gives back unchanged."""
    return yaml.dump(values, Dumper=_PlainDumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def refuse_pickle(path: Path) -> None:
    """Raises `CheckpointError` for a file that is a pickle by its name or its beginning; a missing one is none."""
    try:
        with path.open("rb") as file:
            begins = file.read(9)
        # The length of a safetensors header, eight bytes before its brace, may look like a pickle's beginning.
        safetensors = begins[4:] == b"\0\0\0\0{"
        pickled = path.suffix in PICKLED or (begins.startswith(_PICKLE_BEGINNINGS) and not safetensors)
    except OSError:
        return
    if pickled:
        raise CheckpointError(
            f"{path}: a pickle, which can run code when it is read: refused; save the model once more as safetensors"
        )
