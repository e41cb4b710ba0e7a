"""Which forms of operators a config asks for by name, and whether they can be had, before anything is written."""

from typing import TYPE_CHECKING

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from kernels_pallas.dispatch import Unsupported, preferring
from kernels_pallas.target import current

if TYPE_CHECKING:
    from efficient_lm.config import RunConfig
    from efficient_lm.training.setup import Definition

ANYWHERE = ("auto", "xla", "reference")
"""What every operator can be computed by, whatever its arguments and the machine."""


def named_implementations(model: ModelSpec) -> dict[str, str]:
    """By its key in a config, every implementation that a model asks for and that may not be there."""
    named = {}
    for name, layer in zip(model.layer_names(), model.layers(), strict=True):
        for key, part in layer.within(f"model.blocks.{name}"):
            named[f"{key}.implementation"] = getattr(part, "implementation", "auto")
    return {key: value for key, value in named.items() if value not in ANYWHERE}


def check_kernels(config: "RunConfig") -> None:
    """Refuse kernels that are asked for by name where none runs. Raises `ConfigError`."""
    named = {"train.kernels": config.train.kernels} | named_implementations(config.model)
    where = current().obstacles()
    asked = [key for key, value in named.items() if value == "pallas"]
    if where and asked:
        raise ConfigError(f"{asked[0]}: no kernel runs on {where[0]}; valid here: auto, xla")


def check_implementations(defined: "Definition") -> None:
    """Trace the step of a model that names implementations, which look at shapes and dtypes to say what they can.

    Raises:
        ConfigError: one cannot compute what the config wants of it.
    """
    named = named_implementations(defined.config.model)
    if not named:
        return
    try:
        with defined.layout.active(), preferring(defined.config.train.kernels):
            defined.step.eval_shape(*defined.abstract_arguments())
    except Unsupported as error:
        keys = [key for key, value in named.items() if f"'{value}'" in str(error)]
        raise ConfigError(": ".join([*keys[:1], str(error)])) from None
