"""From a config to everything a run needs, before anything is written: every fault of config or data shows up here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax

from efficient_lm.config import RunConfig
from efficient_lm.data.base import Data
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.elastic.nested import nested_models
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.bits_per_byte import make_scorer
from efficient_lm.evaluation.diagnostics import Diagnostics
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import decay_mask
from efficient_lm.training.freezing import Trainable, for_trained, trainable
from efficient_lm.training.initialization import Source, check_source, transferred
from efficient_lm.training.parallelism import Layout
from efficient_lm.training.step import abstract_state, initial_state, make_step, state_shardings
from kernels_pallas.target import current


@dataclass(frozen=True)
class Setup:
    """A run's parts, and its compiled functions, made when first asked for."""

    config: RunConfig
    tokenizer: Tokenizer
    data: Data
    layout: Layout
    model: LanguageModel
    schedule: Callable[[Any], Any]
    optimizer: optax.GradientTransformation
    chosen: Trainable | None = None

    @cached_property
    def step(self) -> Callable:
        """The jitted training step ``(state, batch) -> (state, metrics)``; the state is donated."""
        train = self.config.train
        step = make_step(
            self.model,
            self.config.objective,
            self.optimizer,
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            dtype=self.config.precision.dtype,
            seed=self.config.run.seed,
            chosen=self.chosen,
            nesting=self.config.nesting,
        )
        shardings = state_shardings(self.model, self.optimizer, self.layout)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, self.layout.replicated))

    @cached_property
    def scorer(self) -> Callable:
        """The jitted evaluation of a batch."""
        return make_scorer(self.model, self.config.precision.dtype)

    @cached_property
    def smaller(self) -> list[tuple[str, Callable, Callable]]:
        """Of each model that is trained inside this one: its name, its part of the parameters, its `scorer`; jitted."""
        if isinstance(self.config.nesting, NoNestingSpec):
            return []
        *small, _ = nested_models(self.model)
        dtype = self.config.precision.dtype
        return [(each.name, jax.jit(each.parameters), make_scorer(each.model, dtype)) for each in small]

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """What looks inside the mixers."""
        return Diagnostics(self.model, self.config.precision.dtype)

    def fresh_state(self, source: Source | None = None) -> dict[str, Any]:
        """Parameters from a source, or from the seed and then born on the devices that keep them."""
        shardings = state_shardings(self.model, self.optimizer, self.layout)
        key = jax.random.key(self.config.run.seed)
        if source is None:
            init = jax.jit(lambda key: initial_state(self.model.init(key), self.optimizer), out_shardings=shardings)
            return init(key)
        params = jax.device_put(transferred(source, self.model, self.tokenizer, key), shardings["parameters"])
        begin = jax.jit(lambda params: initial_state(params, self.optimizer), out_shardings=shardings, donate_argnums=0)
        return begin(params)

    def abstract_state(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.model, self.optimizer, self.layout)


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


def check_kernels(config: RunConfig) -> None:
    """Refuse kernels that are asked for by name where none runs. Raises `ConfigError`."""
    named = {"train.kernels": config.train.kernels}
    for name, layer in zip(config.model.layer_names(), config.model.layers(), strict=True):
        named[f"model.blocks.{name}.mixer.implementation"] = getattr(layer.mixer, "implementation", "auto")
    where = current().obstacles()
    asked = [key for key, value in named.items() if value == "pallas"]
    if where and asked:
        raise ConfigError(f"{asked[0]}: no kernel runs on {where[0]}; valid here: auto, xla")


def prepare(config: RunConfig) -> Setup:
    """Open tokenizer and data, define model and optimizer; nothing is written and no array is allocated.

    Raises:
        ConfigError: parts of the config that do not fit each other.
        DataError: a tokenizer or text file that cannot be used.
    """
    train = config.train
    layout = config.parallelism.build()
    layout.check_batch(train.batch_size, train.accumulate)
    layout.check_experts(config.model)
    check_kernels(config)
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    model = config.model.build()
    model.check_length(train.sequence_length, "train.sequence_length")
    if config.model.elastic is not None:
        nested_models(model)  # It says so if a part leaves nothing that works.
    if config.init_from is not None:
        check_source(Path(config.init_from), model)
    data = config.data.open(tokenizer, train.sequence_length, config.run.seed)
    schedule = config.schedule.build(config.optimizer.learning_rate, train.steps)
    chosen = trainable(model.declarations, train.only, train.freeze, train.frozen_experts)
    optimizer = for_trained(config.optimizer.build(schedule, decay_mask(model.declarations)), chosen)
    return Setup(config, tokenizer, data, layout, model, schedule, optimizer, chosen)
