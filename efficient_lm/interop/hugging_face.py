"""Folders in Hugging Face format: read into parameters, and written back."""

import json
import logging
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.data.tokenizers import (
    COMPANIONS,
    TOKENIZER_FILE,
    AbsentTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
)
from efficient_lm.errors import CheckpointError, ConfigError, ResourceError, nearest, storage_fault
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.families.base import Family, essence
from efficient_lm.interop.keys import Config, Inexpressible
from efficient_lm.interop.state import Names, cast_exactly, parameter_paths, piece_rows, published, read_parameters
from efficient_lm.interop.tensors import DTYPES, SafetensorsFolder, TensorSource, write_safetensors
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import Parameters, count_parameters
from efficient_lm.untrusted import JSON_BYTES, inside, parse_json, read_bytes

log = logging.getLogger(__name__)

CONFIG, GENERATION, ELEMENTS, ROWS = "config.json", "generation_config.json", "dtypes.json", "rows.json"
SEARCH = "search"
"""Where in a run's folder a search for a submodel leaves what it found."""
LISTED = {"layer": 4096, "expert": 65_536, "block_size": 8192}
"""What of a config stands for a list: a part of the names of its keys, and the most that is believed."""
HEADROOM = 1.05
"""Free disk space asked for before a folder is written, as a multiple of the bytes of its tensors."""

UNTOLD = 1 << 24
"""Parameters beyond twice those in the files that a config may describe, before the one that is missing is named."""

ROUNDED = (2e-2, 1e-2)
"""Relative and absolute error of constants that were computed in bfloat16."""


@dataclass(frozen=True)
class Origin:
    """What a published folder says besides its parameters; it goes out with them again.

    Attributes:
        config: config.json.
        dtypes: element type of each tensor.
        files: name and content of other small files.
        rows: of each tensor that is a piece of another, and could have been cut elsewhere.
    """

    config: Config
    dtypes: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        documents = {CONFIG: _json(self.config), ELEMENTS: _json(dict(self.dtypes)), **self.files}
        documents |= {ROWS: _json(dict(self.rows))} if self.rows else {}
        for name, content in documents.items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> "Origin | None":
        """What `save` wrote; None where there is nothing. Raises `CheckpointError` for damaged files."""
        if not folder.is_dir():
            return None
        others = {GENERATION: _bytes(folder / GENERATION)} if (folder / GENERATION).exists() else {}
        rows = read_json(folder / ROWS) if (folder / ROWS).is_file() else {}
        return cls(read_json(folder / CONFIG), read_json(folder / ELEMENTS), others, rows)


@dataclass(frozen=True)
class Description:
    """A published model without its parameters.

    Attributes:
        spec: our architecture.
        family: how its tensors are named.
        tensors: where they are.
        origin: what else it says of itself.
        where: its place, for messages.
    """

    spec: ModelSpec
    family: Family
    tensors: TensorSource
    origin: Origin
    where: str

    def read(self, device: jax.Device | None = None) -> Parameters:
        """Every parameter, float32, on a device, the first there is by default. Raises `CheckpointError`."""
        rates = self.family.applied_dropouts(self.origin.config)
        if rates:
            log.info("%s: %s: dropout is not applied in training here", self.where, ", ".join(rates))
        self._check_constants()
        model = self.spec.build()
        stated, stored = count_parameters(model.declarations), sum(map(math.prod, self.tensors.shapes.values()))
        if stated > 2 * stored + UNTOLD:
            raise CheckpointError(
                f"{self.where}: config.json describes {stated:,} parameters, and the files hold {stored:,}"
            )
        return read_parameters(self.family, model, self.tensors, self.where, device)

    def _check_constants(self) -> None:
        """Raises `CheckpointError` for a tensor that is no parameter here and has other values than the config says."""
        for name, wanted in self.family.constants(self.spec, self.origin.config):
            found = next((n for n in (name, name.removeprefix(self.family.prefix)) if n in self.tensors.shapes), None)
            if found is None:
                continue
            stored = self.tensors.read(found).astype(np.float32)
            if stored.shape != wanted.shape or not np.allclose(stored, wanted, *ROUNDED):
                raise CheckpointError(
                    f"{self.where}: '{found}' has other values than follow from config.json; they are not supported"
                )


def describe_folder(folder: Path) -> Description:
    """Everything about a folder but its tensors.

    Raises:
        CheckpointError: no such folder, a damaged file, no safetensors.
        ConfigError: a model_type or an option that is not supported.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / CONFIG)
    family = family_of(config, str(folder / CONFIG))
    others = {GENERATION: _bytes(folder / GENERATION)} if (folder / GENERATION).is_file() else {}
    return describe(config, SafetensorsFolder(folder), others, str(folder), family)


def describe(
    config: Config, tensors: TensorSource, files: Mapping[str, bytes], where: str, family: Family | None = None
) -> Description:
    """The same for a config and tensors from anywhere. Raises as `describe_folder`."""
    family = family or family_of(config, where)
    _check_sizes(config, where)
    if config.pop("auto_map", None) is not None:
        log.info("%s: its own code (auto_map) is not run: this is the %s built in", where, family.model_type)
    with _located(where):
        spec = family.spec(config)
    spec, tensors = _tied_or_not(spec, family, tensors, where)
    origin = Origin(config, dict(tensors.dtypes), dict(files), piece_rows(family, spec, tensors))
    return Description(spec, family, tensors, origin, where)


def family_of(config: Config, where: str) -> Family:
    """The family that a config names. Raises `CheckpointError` if it names none, `ConfigError` if it is unknown."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: no key 'model_type', so the family is unknown")
    text = config.get("text_config")
    if name not in FAMILIES and isinstance(text, dict) and text.get("model_type") in FAMILIES:
        raise ConfigError(
            f"{where}: model_type '{name}' is text and more; a folder of its text model alone, "
            f"'{text['model_type']}', is supported"
        )
    if name not in FAMILIES:
        raise ConfigError(f"{where}: model_type '{name}' is not supported; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def _check_sizes(config: Config, where: str) -> None:
    """Counts of which lists are made. Raises `CheckpointError` for one that no model has."""
    for name, value in config.items():
        named = name.removesuffix("_intermediate_size")
        most = next((most for part, most in LISTED.items() if part in name and named == name), None)
        if most is not None and isinstance(value, int) and value > most:
            raise CheckpointError(f"{where}: {name}: {value:,} is more than {most:,}, which no model has")


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{where}: {error}") from error


def _tied_or_not(spec: ModelSpec, family: Family, tensors: TensorSource, where: str) -> tuple[ModelSpec, TensorSource]:
    """Folders of tied models may hold the head, or the head in place of the embedding; the values decide."""
    if not spec.tied:
        return spec, tensors
    by_source = {tensor.sources[0].path: tensor for tensor in family.tensors}
    names = Names(family, tensors, where)
    head, embedding = names.find(by_source["head.weight"]), names.find(by_source["embedding.tokens"])
    if head is None:
        return spec, tensors
    if embedding is None:
        return spec, _Renamed(tensors, {by_source["embedding.tokens"].name: head})
    if _equal(tensors, head, embedding):
        return spec, _Renamed(tensors, {}, hidden=head)
    log.warning("%s: tie_word_embeddings is true, but '%s' differs from '%s': not tied", where, head, embedding)
    return spec.model_copy(update={"tied": False}), tensors


def _equal(tensors: TensorSource, first: str, second: str, rows: int = 4096) -> bool:
    if tensors.shapes[first] != tensors.shapes[second]:
        return False
    count = tensors.shapes[first][0]
    pieces = ((start, min(start + rows, count)) for start in range(0, count, rows))
    return all(np.array_equal(tensors.read(first, *piece), tensors.read(second, *piece)) for piece in pieces)


class _Renamed:
    """A source with some tensors under other names, and one hidden."""

    def __init__(self, tensors: TensorSource, names: Mapping[str, str], hidden: str | None = None):
        self._tensors, self._names = tensors, names
        gone = {*names.values(), hidden}
        kept = [name for name in tensors.shapes if name not in gone]
        theirs = {**{name: name for name in kept}, **names}
        self.shapes = {ours: tensors.shapes[name] for ours, name in theirs.items()}
        self.dtypes = {ours: tensors.dtypes[name] for ours, name in theirs.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a tensor."""
        return self._tensors.read(self._names.get(name, name), start, stop)


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; one that only says it is absent where there is no `tokenizer.json`."""
    if (folder / TOKENIZER_FILE).is_file():
        return HuggingFaceTokenizer.read_folder(folder)
    others = [name for name in COMPANIONS if (folder / name).is_file()]
    log.warning(
        "%s: no %s%s: the model takes token ids alone",
        folder,
        TOKENIZER_FILE,
        f" ({', '.join(others)} alone cannot be read)" if others else "",
    )
    return AbsentTokenizer()


def expressed(spec: ModelSpec, origin: Origin | None) -> tuple[Family, Config]:
    """The family that a spec belongs to, and its config.

    Raises:
        ConfigError: no family can express it; says what the nearest one lacks.
    """
    named = FAMILIES.get(origin.config.get("model_type")) if origin else None
    families = [family for family in (named, *FAMILIES.values()) if family]
    faults: list[tuple[Family, Inexpressible]] = []
    for family in dict.fromkeys(family.model_type for family in families):
        try:
            return FAMILIES[family], FAMILIES[family].config(spec)
        except Inexpressible as fault:
            faults.append((FAMILIES[family], fault))
    family, fault = faults[0]
    path, *values = fault.args
    shown = f" is {values[0]!r}" if values else ""
    shown += f", and {family.model_type} has {values[1]!r}" if len(values) > 1 else ""
    raise ConfigError(
        f"no published family ({', '.join(FAMILIES)}) can express this model; of {family.model_type}: {path}{shown}"
        f"{_why(family, path, values)}"
    )


def _why(family: Family, path: str, values: Sequence[Any]) -> str:
    """What else is to be said of a value that a family has no words for."""
    if path == "numbering":
        return "; its layers compute what they did at these places of a larger model, which configs cannot say"
    if len(values) != 1 or not isinstance(values[0], list):
        return ""
    listing = [each.model_type for each in FAMILIES.values() if path.removeprefix("block.") in each.listed]
    others = f", and only {' and '.join(listing)} lists one for each" if listing else ""
    return f"; {family.model_type} has one for all layers{others}; cut the same part of each to write it"


def write_folder(
    folder: Path,
    spec: ModelSpec,
    params: Parameters,
    tokenizer: Tokenizer,
    origin: Origin | None = None,
    context: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a folder in Hugging Face format, whole or not at all.

    Args:
        context: sequence length that the model is made for, where the origin does not say.
        dtype: element type to round to; None takes each tensor's own where that changes no value, and else float32.

    Raises:
        ConfigError: no family can express the model, or an unknown element type.
        CheckpointError: the folder holds something.
        ResourceError: the disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: unknown element type '{dtype}'; {nearest(dtype, DTYPES)}")
    check_free(folder)
    family, config = expressed(spec, origin)
    config = _completed(config, spec, family, tokenizer, origin, context)
    _check_space(folder, params)
    temporary = folder.parent / f".{folder.name}.writing-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        written = _Cast(origin, dtype)
        names, rows = (origin.dtypes, origin.rows) if origin else ({}, {})
        tensors = written.tensors(published(family, spec.build(), params, names, rows))
        write_safetensors(temporary, chain(tensors, family.constants(spec, config)))
        config |= {"dtype": written.dtype, "torch_dtype": written.dtype}
        files = {
            **(origin.files if origin else {}),
            **tokenizer.published_files(begins=origin is None),
            CONFIG: _json(config),
        }
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        fault = storage_fault(error)
        if fault is not None:
            raise ResourceError(f"{folder}: {fault}; nothing was left there") from error
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_free(folder: Path) -> None:
    """Raises `CheckpointError` if a folder that is to be made holds something already, but for a search's results."""
    if folder.exists() and (not folder.is_dir() or any(entry.name != SEARCH for entry in folder.iterdir())):
        raise CheckpointError(f"{folder}: already holds something; choose another folder")


class _Cast:
    """Tensors in the element type they go out in; `dtype` is then the one that most values have."""

    def __init__(self, origin: Origin | None, dtype: str | None):
        self._own = origin.dtypes if origin else {}
        stated = origin and (origin.config.get("dtype") or origin.config.get("torch_dtype"))
        self._default = stated if stated in DTYPES else "float32"
        self._forced = dtype
        self._counts: dict[str, int] = {}

    def tensors(self, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors:
            if self._forced is not None:
                cast = tensor.astype(DTYPES[self._forced])
            else:
                cast = cast_exactly(tensor, self._own.get(name, self._default))
            self._counts[str(cast.dtype)] = self._counts.get(str(cast.dtype), 0) + cast.size
            yield name, cast

    @property
    def dtype(self) -> str:
        return max(self._counts, key=self._counts.__getitem__)


def _completed(
    config: Config, spec: ModelSpec, family: Family, tokenizer: Tokenizer, origin: Origin | None, context: int | None
) -> Config:
    """The config with what is no architecture: as it came in where that still says the same."""
    if origin and _still_true(origin.config, spec, family):
        return dict(origin.config)
    ids: Config = {"use_cache": True, "max_position_embeddings": context or 2048}
    if not isinstance(tokenizer, AbsentTokenizer):
        ids |= {"bos_token_id": tokenizer.begin_of_text, "eos_token_id": tokenizer.end_of_text, "pad_token_id": None}
    kept = {**ids, **origin.config} if origin else ids
    return {**{name: value for name, value in kept.items() if name not in config}, **config}


def _still_true(config: Config, spec: ModelSpec, family: Family) -> bool:
    try:
        return config.get("model_type") == family.model_type and essence(family.spec(config)) == essence(spec)
    except (ConfigError, CheckpointError):
        return False


def _check_space(folder: Path, params: Parameters) -> None:
    needed = HEADROOM * sum(leaf.nbytes for leaf in parameter_paths(params).values())
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(f"{folder}: needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")


def read_json(path: Path) -> Config:
    """A JSON object. Raises `CheckpointError`."""
    try:
        value = parse_json(read_bytes(inside(path.parent, path.name), JSON_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: no {path.name}: not a folder in Hugging Face format") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({(str(error).splitlines() or [''])[0]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(inside(path.parent, path.name), JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
