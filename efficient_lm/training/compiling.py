"""The programs of a config, compiled for a machine that need not be there; no array is made."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from efficient_lm.config import RunConfig
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.training.machines import Machine, here
from efficient_lm.training.parallelism import Layout, ParallelismSpec
from efficient_lm.training.setup import Definition, define, with_vocabulary
from kernels_pallas.ahead import Compiled, TooLarge, compile_ahead
from kernels_pallas.dispatch import preferring
from kernels_pallas.target import compiling_for


def defined_for(config: RunConfig, machine: Machine) -> Definition:
    """A config's model, optimizer and step on a machine. Raises `ConfigError`: it does not fit together, or on it."""
    with compiling_for(machine.target):
        return define(config, machine.devices)


def compiled_step(defined: Definition, machine: Machine, batch: tuple[int, int] | None = None) -> Compiled:
    """The training step, as a run compiles it.

    Args:
        batch: rows, and tokens of each; None: the largest that a step of the config is given.

    Raises:
        TooLarge: the compiler refuses, as it does for TPUs; for others see `Compiled.peak_bytes`.
    """
    arguments, kernels = defined.abstract_arguments(batch), defined.config.train.kernels
    return _compiled(machine, defined.layout, kernels, defined.plain_step(), arguments, defined.step_options)


def compiled_decode(
    config: RunConfig, model: LanguageModel, machine: Machine, rows: int = 1, length: int | None = None
) -> Compiled:
    """The step that decodes a token of each row, as `generate` compiles it, on one device.

    Args:
        length: tokens that the caches have room for; None: `train.sequence_length`.

    Raises:
        ConfigError: a mixer that cannot decode. TooLarge: as `compiled_step`.
    """
    layout = ParallelismSpec().build(list(machine.devices[:1]))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    decoder = Decoder(model, params, config.precision.dtype)
    step, arguments, options = decoder.abstract_step(rows, length or config.train.sequence_length, SamplingSpec())
    arguments = layout.abstract(arguments)
    return _compiled(machine.alone(), layout, config.train.kernels, step, arguments, options)


def peak_bytes(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> int:
    """Bytes of one device that a training step takes at its peak: state, batch and all that lives during the step.

    Of a CPU that is what a run's arrays add to the memory of its process.

    Args:
        devices: of this process; all, by default.

    Raises:
        ConfigError: the config does not fit together. DataError: its tokenizer, if that is to say how large the
            vocabulary is, cannot be read.
    """
    machine = here(devices)
    if config.model.vocab_size is None:
        config = with_vocabulary(config, config.tokenizer.build())
    try:
        return compiled_step(defined_for(config, machine), machine).peak_bytes
    except TooLarge as error:
        return error.needed


def _compiled(
    machine: Machine, layout: Layout, kernels: str, function: Callable, arguments: Sequence[Any], options: dict
) -> Compiled:
    with layout.active(), preferring(kernels):
        if machine.topology is None:
            traced = jax.jit(function, **options).trace(*arguments)
            return Compiled.of(traced, traced.lower().compile(), machine.target)
        return compile_ahead(function, arguments, machine.topology, layout.mesh, **options)
