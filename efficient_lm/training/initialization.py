"""Training that begins with the parameters of another model: a published one, a run, or a checkpoint of one.

Every parameter that both models have, in the same layer and of the same shape, is taken as it is. Rows of the
vocabulary are matched by what their tokens stand for, rows of learned positions by their number. What is left is newly
initialised, and said.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.data.tokenizers import Tokenizer, load_tokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.interop.hugging_face import Origin
from efficient_lm.interop.sources import is_published, open_published
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import Declaration, Parameters, map_declarations, parameter_table
from efficient_lm.runtime import host_device
from efficient_lm.training.checkpoints import load_parameters
from efficient_lm.training.run_directory import locate
from efficient_lm.validation import validate

log = logging.getLogger(__name__)

GROWING = ("vocab", "positions")
"""Logical axes whose size may differ between the source and the model that begins with it."""

SHOWN = 4
"""Parameters named in a message before the rest is counted."""


@dataclass(frozen=True)
class Source:
    """A model that another one begins with.

    Attributes:
        where: its path, for messages.
        context: tokens that it was made for; None where it does not say.
    """

    where: str
    model: LanguageModel
    params: Parameters
    tokenizer: Tokenizer
    origin: Origin | None
    context: int | None


OWN = ("run", "tracker", "init_from", "init_state")
"""Sections of a config that no other run takes over."""


def sections(source: str, whole: bool = False) -> dict[str, Any]:
    """`model` and `tokenizer` of a run config that begins with `source`, as plain values; no tensor is read.

    Args:
        whole: every section of a run that another may take over.

    Raises:
        CheckpointError, ConfigError: as `efficient_lm.load`.
    """
    path = Path(source)
    if is_published(path):
        found = open_published(path)
        return {"model": found.described.spec.dump(), "tokenizer": found.tokenizer_choice}
    run, _ = locate(path)
    config = _config(run.config)
    own = config.tokenizer.dump()
    tokenizer = {"kind": "file", "path": str(run.tokenizer.absolute())} if own["kind"] == "file" else own
    rest = {name: section for name, section in config.dump().items() if whole and name not in OWN}
    return {**rest, "model": config.model.dump(), "tokenizer": tokenizer}


def read_source(path: Path) -> Source:
    """The model at a path, with its parameters in the host's memory: no accelerator need hold them whole.

    Raises:
        CheckpointError, ConfigError: as `efficient_lm.load`.
    """
    if is_published(path):
        found = open_published(path)
        described = found.described
        model = described.spec.build()
        return Source(str(path), model, described.read(host_device()), found.tokenizer, described.origin, found.context)
    run, step = locate(path)
    config = _config(run.config)
    model = config.model.build()
    params, _ = load_parameters(run.checkpoints, model.declarations, step, device=host_device())
    length = config.model.learned_positions or config.train.sequence_length
    return Source(str(path), model, params, load_tokenizer(run.tokenizer), Origin.load(run.origin), length)


def _config(path: Path) -> Any:
    # The config of a run names this room's specs: imported when asked for, or the two would import each other.
    from efficient_lm.config import read_config

    return read_config(path)


def check_source(path: Path, model: LanguageModel, whole: bool = False) -> None:
    """Whether `model` can begin with the model at a path; no tensor is read. Raises as `transferred`.

    Args:
        whole: with its optimizer and its step too, which only runs have.
    """
    if whole and is_published(path):
        raise ConfigError(f"init_state: all is of runs, and {path} is a published model; use parameters")
    spec = validate(ModelSpec, sections(str(path))["model"], "model")
    theirs = {name: declared.shape for name, declared, _ in _places(spec.build())}
    _check_shapes(theirs, {name: declared for name, declared, _ in _places(model)}, str(path))


def transferred(source: Source, model: LanguageModel, tokenizer: Tokenizer, key: jax.Array) -> Parameters:
    """Parameters of `model`, from the source where it has them and drawn with `key` where not.

    Raises:
        ConfigError: a parameter whose shapes differ in more than the vocabulary or the positions.
    """
    rows = matching_rows(source.tokenizer, tokenizer, source.model.spec.vocab_size, model.spec.vocab_size)
    theirs = dict(_layered(source.params, source.model))
    ours = {name: declared for name, declared, _ in _places(model)}
    _check_shapes({name: view.shape for name, view in theirs.items()}, ours, source.where)
    if _alike(source, model) and np.array_equal(rows, np.arange(model.spec.vocab_size)):
        log.info("init_from %s: all %d parameters are taken as they are", source.where, len(ours))
        return source.params
    fresh = jax.tree.map(np.array, jax.jit(model.init)(key))
    new: list[str] = []
    grown: list[str] = []
    for (name, declared, _), (_, view) in zip(_places(model), _layered(fresh, model), strict=True):
        if name not in theirs:
            new.append(name)
        elif "vocab" in declared.axes:
            grown += _take_vocabulary(view, theirs[name], declared, rows, name)
        else:
            grown += _take_rows(view, theirs[name], name)
    left = [name for name in theirs if name not in ours]
    _report(source.where, len(ours), new, left, grown)
    return fresh


def matching_rows(theirs: Tokenizer, ours: Tokenizer, their_size: int, our_size: int) -> np.ndarray:
    """For each id of our vocabulary the source's id of the same token, -1 where it has none: int64 [our_size]."""
    rows = np.full(our_size, -1, np.int64)
    if theirs.fingerprint == ours.fingerprint:
        common = min(their_size, our_size)
        rows[:common] = np.arange(common)
        return rows
    known = {token: index for index, token in enumerate(theirs.meanings()) if token is not None and index < their_size}
    for index, token in enumerate(ours.meanings()[:our_size]):
        rows[index] = known.get(token, -1) if token is not None else -1
    rows[ours.end_of_text], rows[ours.begin_of_text] = theirs.end_of_text, theirs.begin_of_text
    return rows


def _take_vocabulary(
    view: np.ndarray, theirs: np.ndarray, declared: Declaration, rows: np.ndarray, name: str
) -> Iterator[str]:
    """Rows of known tokens; others get the mean of the source's, so that they begin as likely as a middling token."""
    axis = declared.axes.index("vocab")
    ours, source = np.moveaxis(view, axis, 0), np.moveaxis(theirs, axis, 0)
    # A table may have fewer rows than the vocabulary.
    rows = rows[: len(ours)]
    known = (rows >= 0) & (rows < len(source))
    ours[: len(rows)][known] = source[rows[known]]
    ours[: len(rows)][~known] = source.mean(axis=0)
    if not known.all():
        yield f"{name}: {(~known).sum():,} of {len(rows):,} tokens are new, and begin with the mean of the source's"


def _take_rows(view: np.ndarray, theirs: np.ndarray, name: str) -> Iterator[str]:
    common = min(len(view), len(theirs)) if view.ndim else 0
    view[:common] = theirs[:common]
    if common < len(view):
        yield f"{name}: {len(view) - common:,} of {len(view):,} rows are newly initialised"


def _report(where: str, count: int, new: list[str], left: list[str], grown: list[str]) -> None:
    log.info("init_from %s: %d of %d parameters are taken as they are", where, count - len(new) - len(grown), count)
    for line in grown:
        log.warning("init_from: %s", line)
    for verb, names in (("newly initialised", new), ("left out", left)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            log.warning("init_from: %s: %s%s", verb, ", ".join(names[:SHOWN]), more)


def _check_shapes(theirs: dict[str, tuple[int, ...]], ours: dict[str, Declaration], where: str) -> None:
    for name, declared in ours.items():
        if name not in theirs:
            continue
        found = theirs[name]
        if len(found) != len(declared.shape):
            raise ConfigError(f"init_from: '{name}' is {list(found)} in {where} and {list(declared.shape)} here")
        for axis, there, here in zip(declared.axes, found, declared.shape, strict=True):
            if there != here and axis not in GROWING:
                raise ConfigError(
                    f"init_from: '{name}' is {list(found)} in {where} and {list(declared.shape)} here: "
                    f"'{axis}' may not change; give the model the source's sizes"
                )


def _alike(source: Source, model: LanguageModel) -> bool:
    def shapes(of: LanguageModel) -> Parameters:
        return map_declarations(lambda declared: declared.shape, of.declarations)

    return shapes(source.model) == shapes(model)


def _places(model: LanguageModel) -> Iterator[tuple[str, Declaration, tuple[str, int | None]]]:
    """Name, declaration, and (path, index) in the parameters, of each parameter of each layer."""
    table = parameter_table(model.declarations)
    for path, declared in table:
        if not path.startswith("stack."):
            yield path, declared, (path, None)
    for number, (segment, layer, index) in enumerate(model.stack.places):
        prefix = f"stack.{segment}.{layer}."
        for path, declared in table:
            if path.startswith(prefix):
                yield f"layers.{number}.{path.removeprefix(prefix)}", declared.unstacked(), (path, index)


def _layered(params: Parameters, model: LanguageModel) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host view of each parameter of each layer, in the order of `_places`."""
    leaves = jax.tree.leaves(params)
    arrays = dict(zip((path for path, _ in parameter_table(model.declarations)), map(np.asarray, leaves), strict=True))
    for name, _, (path, index) in _places(model):
        yield name, arrays[path] if index is None else arrays[path][index]
