"""From a config to everything a run needs, before anything is written: every fault of config or data shows up here."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax

from efficient_lm.config import RunConfig
from efficient_lm.data.base import Data
from efficient_lm.data.fingerprint import fingerprint
from efficient_lm.data.tokenizers import AbsentTokenizer, Tokenizer
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.bits_per_byte import make_scorer
from efficient_lm.evaluation.diagnostics import Diagnostics
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.training.freezing import Trainable, trainable
from efficient_lm.training.implementations import check_implementations, check_kernels
from efficient_lm.training.initialization import Source, check_source, transferred
from efficient_lm.training.parallelism import Layout
from efficient_lm.training.parameterization import started
from efficient_lm.training.portions import Portions
from efficient_lm.training.probes import make_probe, parameter_sizes
from efficient_lm.training.step import abstract_state, initial_state, make_step, state_shardings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Definition:
    """What a config says of a run before any text is read, and its training step, compiled when first called.

    Attributes:
        chosen: the parameters that change; None: all.
        growths: how much larger each parameter is than at the base width of the parametrization; None: not at all.
    """

    config: RunConfig
    layout: Layout
    model: LanguageModel
    schedule: Callable[[Any], Any]
    optimizer: optax.GradientTransformation
    chosen: Trainable | None
    growths: Any

    @property
    def averaged(self) -> bool:
        """Whether an average of the parameters is kept."""
        return self.config.train.average is not None

    @cached_property
    def portions(self) -> Portions:
        """What each step is given."""
        return Portions(self.config.train)

    @cached_property
    def step_options(self) -> dict[str, Any]:
        """How the training step is jitted: the state is donated, and stays where it is."""
        shardings = state_shardings(self.model, self.optimizer, self.layout, self.averaged)
        shardings |= {"spikes": self.layout.replicated} if self.config.train.spike.looks else {}
        return {"donate_argnums": 0, "out_shardings": (shardings, self.layout.replicated)}

    @cached_property
    def step(self) -> Callable:
        """The jitted training step ``(state, batch) -> (state, metrics)``; the state is donated."""
        return jax.jit(self.plain_step(), **self.step_options)

    def plain_step(self, look: Callable | None = None) -> Callable:
        """The training step, not jitted; `look` as in `training.step.make_step`."""
        train = self.config.train
        return make_step(
            self.model,
            self.config.objective,
            self.optimizer,
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            dtype=self.config.precision.dtype,
            seed=self.config.run.seed,
            chosen=self.chosen,
            nesting=self.config.nesting,
            average=train.average,
            spike=train.spike,
            look=look,
        )

    def abstract_state(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.model, self.optimizer, self.layout, self.averaged)

    def abstract_arguments(self, batch: tuple[int, int] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes, dtypes and shardings of what the step is called with.

        Args:
            batch: rows, and tokens of each; None: the largest that a step of the config is given.
        """
        spikes = self.layout.abstract(self.config.train.spike.resumed({}))
        return self.abstract_state() | spikes, self.layout.abstract_batch(*(batch or self.portions.largest.batch))


@dataclass(frozen=True)
class Setup(Definition):
    """A run's parts, and its compiled functions, made when first asked for."""

    tokenizer: Tokenizer
    data: Data

    @cached_property
    def probe(self) -> Callable:
        """The jitted look ``(state, batch) -> sizes`` at what the step is about to do (see `training.probes`)."""
        probe = make_probe(self.plain_step(parameter_sizes), self.model, self.config.precision.dtype)
        return jax.jit(probe, out_shardings=self.layout.replicated)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What a checkpoint comes from, besides its config: told with every checkpoint, compared when it is resumed."""
        mesh = self.layout.mesh
        return {
            "seed": self.config.run.seed,
            "tokenizer": self.tokenizer.fingerprint,
            "data": fingerprint(self.data),
            "layout": {"devices": mesh.size, "processes": jax.process_count(), "mesh": dict(mesh.shape)},
        }

    @cached_property
    def scorer(self) -> Callable:
        """The jitted evaluation of a batch."""
        return make_scorer(self.model, self.config.precision.dtype, sharding=self.layout.replicated)

    @cached_property
    def smaller(self) -> list[tuple[str, Callable, Callable]]:
        """Of each model that is trained inside this one: its name, its part of the parameters, its `scorer`; jitted."""
        if isinstance(self.config.nesting, NoNestingSpec):
            return []
        *small, _ = nested_models(self.model)
        options = {"dtype": self.config.precision.dtype, "sharding": self.layout.replicated}
        return [(each.name, jax.jit(each.parameters), make_scorer(each.model, **options)) for each in small]

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """What looks inside the mixers."""
        return Diagnostics(self.model, self.config.precision.dtype)

    def fresh_parameters(self, key: jax.Array) -> Parameters:
        """Parameters as the parametrization starts them; to be called in a trace."""
        return started(self.model.init(key), self.growths)

    def fresh_state(self, source: Source | None = None) -> dict[str, Any]:
        """Parameters from a source, or from the seed and then born on the devices that keep them."""
        shardings = state_shardings(self.model, self.optimizer, self.layout, self.averaged)
        key = jax.random.key(self.config.run.seed)
        if source is None:
            born = lambda key: initial_state(self.fresh_parameters(key), self.optimizer, self.averaged)  # noqa: E731
            return jax.jit(born, out_shardings=shardings)(key)
        params = jax.device_put(transferred(source, self.model, self.tokenizer, key), shardings["parameters"])
        begin = jax.jit(
            lambda params: initial_state(params, self.optimizer, self.averaged),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return begin(params)

    def kept_in_record(self, record: dict[str, Any]) -> dict[str, Any]:
        """What of the state is in a checkpoint's record, and not among its arrays."""
        spike = self.config.train.spike
        return jax.device_put(spike.resumed(record), self.layout.replicated)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with `model.vocab_size` known. Raises `ConfigError` if it is too small for data or tokenizer."""
    size, needed = config.model.vocab_size, config.data.vocab_size or tokenizer.vocab_size
    if size is not None and size < needed:
        owner = "tokenizer" if config.data.vocab_size is None else "data"
        raise ConfigError(
            f"model.vocab_size: {size} is smaller than the {owner}'s {needed}; "
            f"use null for the {owner}'s size, or at least {needed}"
        )
    model = config.model.model_copy(update={"vocab_size": size or needed})
    return config.model_copy(update={"model": model})


def with_factors(config: RunConfig) -> RunConfig:
    """The config with the constant factors that go with the model's width; of a model that is there, with its own.

    Raises:
        ConfigError: the model does not work at the parametrization's base width.
    """
    model, parameterization = config.parameterization.held(config.model)
    model = model if config.init_from is None else config.model
    return config.model_copy(update={"model": model, "parameterization": parameterization})


def schedule_of(config: RunConfig) -> Callable[[Any], Any]:
    """Step, from 0 → learning rate."""
    return config.schedule.build(config.optimizer.learning_rate, config.train.steps)


def define(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Definition:
    """Define model, optimizer and step of a config whose `model.vocab_size` is known, on `devices` (all, by default).

    Raises:
        ConfigError: parts of the config that do not fit each other, or the devices.
    """
    defined = _defined(config, _laid_out(config, devices))
    check_implementations(defined)
    return defined


def prepare(config: RunConfig) -> Setup:
    """Open tokenizer and data, define model and optimizer; nothing is written and no array is allocated.

    Raises:
        ConfigError: parts of the config that do not fit each other.
        DataError: a tokenizer or text file that cannot be used.
    """
    layout = _laid_out(config)
    tokenizer = config.tokenizer.build()
    if config.data.reads_text and isinstance(tokenizer, AbsentTokenizer):
        raise ConfigError(f"tokenizer: data of the kind '{config.data.kind}' is text; valid: sotu_bpe, bytes, file")
    defined = _defined(with_vocabulary(config, tokenizer), layout)
    config, model = defined.config, defined.model
    if config.init_from is not None:
        check_source(Path(config.init_from), model, config.init_state == "all")
    data = config.data.open(tokenizer, config.train.sequence_length, config.run.seed)
    if config.optimizer.replaces_decay and config.schedule.end(config.train.steps) < 1:
        log.warning(
            "schedule: %s lowers the learning rate of %s, whose average of the way stands in for that; "
            "schedule=constant leaves it to the average", config.schedule.kind, config.optimizer.kind,
        )  # fmt: skip
    setup = Setup(**vars(defined), tokenizer=tokenizer, data=data)
    check_implementations(setup)
    return setup


def _laid_out(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The devices as the config arranges them, which the batch and the experts divide over."""
    layout = config.parallelism.build(None if devices is None else list(devices))
    Portions(config.train).check(layout, config.train.accumulate)
    layout.check_experts(config.model)
    check_kernels(config)
    return layout


def _defined(config: RunConfig, layout: Layout) -> Definition:
    config = with_factors(config)
    model, train = config.model.build(), config.train
    model.check_length(train.sequence_length, "train.sequence_length")
    layout.check_context(config.model, *(portion.length for portion in Portions(train).portions))
    if config.model.elastic is not None:
        nested_models(model)  # It says so if a part leaves nothing that works.
    schedule = schedule_of(config)
    chosen = trainable(model.declarations, train.only, train.freeze, train.frozen_experts)
    growths = config.parameterization.growth(model)
    optimizer = config.optimizer.build(schedule, model.declarations, growths=growths, chosen=chosen)
    return Definition(config, layout, model, schedule, optimizer, chosen, growths)
