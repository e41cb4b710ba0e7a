"""Rotary positions in published configs: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

import math
from dataclasses import dataclass, field
from typing import Any

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.interop.keys import ABSENT, Config, Draft, Inexpressible, Layers, mapping

SCALINGS = ("default", "linear", "llama3", "yarn")
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding for all layers.

    Attributes:
        theta_key: where transformers 4 keeps the base.
        fraction_key: where it keeps the share of each head that turns; None if the family turns whole heads.
        fraction: the default share.
        theta: the default base.
        scope: the kind of layer that turns, where not all do.
        scalable: whether the family reads any `rope_type` but the default.
        optional: whether a base of null means that nothing turns.
        stated: the parameters of a config that states none.
    """

    theta_key: str = "rope_theta"
    fraction_key: str | None = None
    fraction: float = 1.0
    theta: float = 10000.0
    scope: str = "block"
    scalable: bool = True
    optional: bool = False
    stated: Config = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the spec says it."""
        return f"{self.scope}.mixer.position"

    def read(self, config: Config, draft: Draft) -> None:
        # As transformers 5 does: `rope_scaling` comes first, and what it leaves open is taken from beside it.
        stated = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
        if not stated and config.get("rope_parameters") is None:
            stated = self.stated
        if any(isinstance(value, dict) for value in stated.values()):
            raise ConfigError(f"rope_parameters: {', '.join(stated)}: parameters by layer type are not supported here")
        share = config.get(self.fraction_key or "partial_rotary_factor")
        parameters = {
            "rope_theta": config.get(self.theta_key, self.theta),
            "partial_rotary_factor": self.fraction if share is None else share,
            **stated,
        }
        if self.optional and parameters["rope_theta"] is None:
            draft.put(self.path, {"kind": "none"})
            return
        spec = position(parameters, config, partial=self.fraction_key is not None)
        if "scaling" in spec and not self.scalable:
            raise ConfigError(f"rope_parameters.rope_type: '{spec['scaling']['kind']}' is not supported; default is")
        draft.put(self.path, spec)

    def write(self, layers: Layers, config: Config) -> None:
        spec = layers.get(self.path)
        if spec is ABSENT:
            return
        if self.optional and spec["kind"] == "none":
            config |= {"rope_parameters": {"rope_type": "default", "rope_theta": None}, self.theta_key: None}
            return
        parameters = published(spec)
        if self.fraction_key:
            config[self.fraction_key] = parameters["partial_rotary_factor"]
        else:
            parameters.pop("partial_rotary_factor")
        config |= {"rope_parameters": parameters, self.theta_key: parameters["rope_theta"]}
        config["rope_scaling"] = scaling(parameters)


def scaling(parameters: Config) -> Config | None:
    """`rope_scaling` as transformers 4 writes it; None for plain rotary positions."""
    if parameters["rope_type"] == "default":
        return None
    return {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}


def position(parameters: Config, config: Config, partial: bool) -> Config:
    """Our position spec for `rope_parameters`.

    Args:
        config: whose `max_position_embeddings` stands in for an original context that is not stated.
        partial: whether the family can turn a part of each head.

    Raises:
        ConfigError: a kind of scaling, or an option, that is not supported.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SCALINGS:
        raise ConfigError(f"rope_parameters.rope_type: '{kind}' is not supported; {nearest(kind, SCALINGS)}")
    for name in _NEEDED.get(kind, ()):
        if parameters.get(name) is None:
            raise ConfigError(f"rope_parameters.{name}: missing, and rope_type '{kind}' needs it")
    share = parameters.get("partial_rotary_factor", 1.0)
    if not partial and kind != "default" and share != 1.0:
        raise ConfigError(f"rope_parameters.partial_rotary_factor: {share} is not supported with rope_type '{kind}'")
    spec: Config = {"kind": "rotary", "theta": parameters["rope_theta"], "fraction": share if partial else 1.0}
    if kind == "linear":
        spec["scaling"] = {"kind": "linear", "factor": parameters["factor"]}
    elif kind == "llama3":
        spec["scaling"] = {
            "kind": "llama3", "factor": parameters["factor"],
            "low_frequency_factor": parameters["low_freq_factor"],
            "high_frequency_factor": parameters["high_freq_factor"],
            "original_context": _original(parameters, config),
        }  # fmt: skip
    elif kind == "yarn":
        spec["scaling"] = _yarn(parameters, config)
    return spec


def _original(parameters: Config, config: Config) -> int:
    stated = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = stated or config.get("max_position_embeddings")
    if original is None:
        raise ConfigError("rope_parameters.original_max_position_embeddings: missing, and max_position_embeddings too")
    return original


def _yarn(parameters: Config, config: Config) -> Config:
    original = _original(parameters, config)
    factor = parameters.get("factor")
    if factor is None:
        if config.get("max_position_embeddings") is None:
            raise ConfigError("rope_parameters.factor: missing, and rope_type 'yarn' needs it")
        factor = config["max_position_embeddings"] / original
    attention = parameters.get("attention_factor")
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention is None and scale and scale_all:
        attention = _temperature(factor, scale) / _temperature(factor, scale_all)
    return {
        "kind": "yarn", "factor": factor, "original_context": original, "attention_factor": attention,
        "beta_fast": parameters.get("beta_fast") or 32.0, "beta_slow": parameters.get("beta_slow") or 1.0,
        "truncate": parameters.get("truncate", True),
    }  # fmt: skip


def _temperature(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def published(spec: Any) -> Config:
    """`rope_parameters` for our position spec. Raises `Inexpressible` for one that is not rotary."""
    if not spec or spec["kind"] != "rotary":
        raise Inexpressible("block.mixer.position", spec and spec["kind"])
    parameters: Config = {"rope_theta": spec["theta"], "partial_rotary_factor": spec["fraction"]}
    scaled = spec["scaling"]
    if scaled is None:
        return {"rope_type": "default", **parameters}
    parameters |= {"rope_type": scaled["kind"], "factor": scaled["factor"]}
    if scaled["kind"] == "llama3":
        parameters |= {
            "low_freq_factor": scaled["low_frequency_factor"], "high_freq_factor": scaled["high_frequency_factor"],
            "original_max_position_embeddings": scaled["original_context"],
        }  # fmt: skip
    elif scaled["kind"] == "yarn":
        parameters |= {
            "original_max_position_embeddings": scaled["original_context"], "beta_fast": scaled["beta_fast"],
            "beta_slow": scaled["beta_slow"], "truncate": scaled["truncate"],
        }  # fmt: skip
        if scaled["attention_factor"] is not None:
            parameters["attention_factor"] = scaled["attention_factor"]
    return parameters
