"""The Python interface to what is done with experts (made, merged, dropped, looked at) and with depth."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.api import Model
from efficient_lm.config import RunConfig
from efficient_lm.data.base import DataSpec
from efficient_lm.data.packing import Batch
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation import routing as seen
from efficient_lm.evaluation.routing_report import figures
from efficient_lm.evaluation.rows import text_rows
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import Parameters
from efficient_lm.spec import OneOf, Spec
from efficient_lm.training.checkpoints import Checkpoints, load_parameters
from efficient_lm.training.parameterization import StandardSpec
from efficient_lm.training.run_directory import locate
from efficient_lm.upcycling.base import ExpertsSpec, UpcyclingSpec
from efficient_lm.upcycling.conversion import upcycled, upcycled_spec
from efficient_lm.upcycling.extraction import Importance, check_count, extracted, important_experts, listed_experts
from efficient_lm.upcycling.merging import Rows, Source, merged
from efficient_lm.upcycling.mixture_of_depths import DepthsSpec, with_mixture_of_depths
from efficient_lm.upcycling.statistics import Domains, clustered, labelled
from efficient_lm.validation import of_kind

ROWS = 64
"""Rows of text that are looked at, of each domain, where nobody says how many."""

Texts = str | Sequence[str]
"""A file, or files."""


class _Method(Spec):
    method: OneOf[UpcyclingSpec]


def upcycle(
    model: Model,
    method: str | UpcyclingSpec = "copy",
    text: Texts | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A model with mixtures of experts in place of its dense channel mixers, or with mixture of depths around layers.

    Args:
        method: its kind, with its attributes as `options`: ``upcycle(model, "copy", experts=8)``; or the whole method.
        text: files that a method looks at; to experts each is a domain, unless the method makes its own of all. None
            takes the validation part of what the model was trained on.
        sequence_length: tokens of a row of these; None takes that of training.
        rows: of each domain, at most.
        seed: of what is drawn.

    Raises:
        ConfigError: no dense channel mixer, values that do not fit it, as many texts as there are no experts.
        DataError: a file that cannot be read.
    """
    method = of_kind(_Method, "method", method, options)
    if isinstance(method, DepthsSpec):
        method.check(model.model)  # Before any text is read.
        batch, dense = rows_of(model, text, sequence_length, rows), (model.model, model.params)
        layers, key = method.chosen(*dense, batch, model.dtype), jax.random.key(seed)
        return _with(model, *with_mixture_of_depths(*dense, layers, key, method.rule, batch, model.dtype))
    upcycled_spec(model.model, method)  # Before any text is read.
    domains = _domains(model, method, text, sequence_length, rows, seed) if method.looks else None
    spec, params = upcycled(model.model, model.params, method, jax.random.key(seed), domains, model.dtype)
    return _with(model, spec, params)


def merge(
    models: Mapping[str, Model],
    rows_of_routers: Rows | None = None,
    top_k: int | None = None,
    bias: float | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
) -> Model:
    """One model with the experts of several that share a backbone, by name.

    See `efficient_lm.upcycling.merging.merged`; the text of a model's domain is the validation part of what it was
    trained on, at most `rows` rows of it. Raises `ConfigError` for models that cannot be merged.
    """
    first = next(iter(models.values()))
    for name, model in models.items():
        if model.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(f"checkpoints: {name} has another tokenizer than {next(iter(models))}")
    reads = rows_of_routers != "trained"
    sources = [
        Source(name, model.model, model.params, rows_of(model, None, sequence_length, rows) if reads else None)
        for name, model in models.items()
    ]
    return _with(first, *merged(sources, rows_of_routers, top_k, bias))


def extract(
    model: Model,
    experts: int | Sequence[int] | Sequence[Sequence[int]],
    by: Importance = "reconstruction",
    uneven: bool = False,
    spare_super_experts: bool = True,
    top_k: int | None = None,
    text: Texts | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
) -> Model:
    """The model with some of its experts.

    Args:
        experts: which, the same in every layer or a list for each layer with experts; or how many, and then the most
            important ones (see `efficient_lm.upcycling.extraction.important_experts`).
        top_k: experts that a token takes from then on; None: as before.
        text, sequence_length, rows: what importance is measured on; as of `upcycle`.

    Raises:
        ConfigError: an expert there is not, fewer left than a token takes.
    """
    if isinstance(experts, int):
        check_count(model.model, experts, top_k)  # Before any text is read.
        batch = rows_of(model, text, sequence_length, rows)
        found = seen.routing(model.model, model.params, batch, model.dtype)
        kept = important_experts(model.model, found, experts, by, uneven, spare_super_experts)
    else:
        kept = listed_experts(model.model, experts)
    return _with(model, *extracted(model.model, model.params, kept, top_k))


def routing(
    model: Model,
    text: Texts | None = None,
    data: DataSpec | None = None,
    sequence_length: int | None = None,
    rows: int = ROWS,
    earlier: Iterable[tuple[int, Parameters]] = (),
) -> dict[str, Any]:
    """What routers and experts do (see `efficient_lm.evaluation.routing_report.figures`).

    Args:
        text: files; several are compared as domains. None takes the validation part of `data`.
        data: None takes what the model was trained on.
        sequence_length, rows: as of `upcycle`.
        earlier: parameters of earlier steps, whose routes are compared with the model's; see `earlier_parameters`.
    """
    paths = [text] if isinstance(text, str) else text
    if paths is None:
        batch, domains = model.validation_rows(data, sequence_length, rows), None
    else:
        found = labelled([rows_of(model, path, sequence_length, rows) for path in paths])
        batch = found.batch
        domains = {path: np.flatnonzero(found.labels == number) for number, path in enumerate(paths)}
    layers = seen.routing(model.model, model.params, batch, model.dtype)
    stability = seen.agreement(model.model, model.params, earlier, batch, model.dtype)
    return figures(layers, batch, stability, domains)


def earlier_parameters(checkpoint: str | Path, model: Model) -> Iterator[tuple[int, Parameters]]:
    """Step and parameters of the other checkpoints that are kept beside that of `model`, earliest first."""
    path = Path(checkpoint)
    if not (path / "config.yaml").is_file() and path.parent.name != "checkpoints":
        return
    run, _ = locate(path)
    checkpoints = Checkpoints(run.checkpoints)
    steps = [step for step in checkpoints.steps if step < model.step]
    checkpoints.close()
    for step in steps:
        yield step, load_parameters(run.checkpoints, model.model.declarations, step)[0]


def _domains(
    model: Model, method: ExpertsSpec, text: Texts | None, length: int | None, rows: int, seed: int
) -> Domains:
    if not isinstance(method.experts, int):
        raise ConfigError("method.experts: where domains decide, all layers have as many: give one number")
    if method.clusters:
        return clustered(model.params, rows_of(model, text, length, rows), method.experts, seed)
    paths = [text] if isinstance(text, str) else list(text or ())
    if len(paths) != method.experts:
        raise ConfigError(
            f"text: {len(paths)} files are as many domains, and method.experts is {method.experts}: give one for each"
        )
    return labelled([rows_of(model, path, length, rows) for path in paths])


def rows_of(
    model: Model, text: Texts | None = None, sequence_length: int | None = None, rows: int = ROWS
) -> Batch:  # fmt: skip
    """What is looked at; arguments as of `upcycle`, with all files one text."""
    if text is None:
        return model.validation_rows(None, sequence_length, rows)
    length = sequence_length or model.config.train.sequence_length
    model.model.check_length(length, "sequence_length")
    return text_rows([text] if isinstance(text, str) else text, model.tokenizer, length, rows)


def _with(model: Model, spec: ModelSpec, params: Parameters) -> Model:
    """A model of another architecture with the same tokenizer; its config is one of a run that has not begun."""
    changes = {
        "model": spec, "init_from": None, "nesting": NoNestingSpec(), "parameterization": StandardSpec(),
    }  # fmt: skip
    config: RunConfig = model.config.model_copy(update=changes)
    return Model(config, params, model.tokenizer, origin=model.origin)
