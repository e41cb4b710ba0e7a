"""Falcon-H1 (TII 2025): Mamba-2 and attention side by side in every layer, and constant factors throughout."""

import math
from dataclasses import dataclass

from efficient_lm.errors import ConfigError
from efficient_lm.interop.families.bamba import FEED_FORWARD, TENSORS, attended, duality_keys
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import MODEL, RMS, attention
from efficient_lm.interop.families.mamba2 import duality
from efficient_lm.interop.keys import Config, Draft, Layers, count, key
from efficient_lm.interop.placement import Depth
from efficient_lm.interop.rotary import Rotary

STATE, ATTEND = "block.mixer.first", "block.mixer.second"


@dataclass(frozen=True)
class OneEach:
    """A list with a value for each of several paths; ones, where it is left out."""

    name: str
    paths: tuple[str, ...]

    def read(self, config: Config, draft: Draft) -> None:
        values = config.get(self.name) or [1.0] * len(self.paths)
        if not isinstance(values, list) or len(values) != len(self.paths):
            raise ConfigError(f"{self.name}: {values!r} is not a list of {len(self.paths)} numbers")
        for path, value in zip(self.paths, values, strict=True):
            draft.put(path, value)

    def write(self, layers: Layers, config: Config) -> None:
        config[self.name] = [layers.get(path) for path in self.paths]


class KeyMultiplier:
    """`key_multiplier`, a factor of the keys: the same as a factor of the logits, which our attention has."""

    path = f"{ATTEND}.mixer.scale"

    def read(self, config: Config, draft: Draft) -> None:
        factor = config.get("key_multiplier", 1.0)
        if factor <= 0:
            raise ConfigError(f"key_multiplier: {factor} is not supported; a number above zero is")
        size = config.get("head_dim") or count(config, "hidden_size", 4096) // count(config, "num_attention_heads", 32)
        draft.put(self.path, None if factor == 1 else factor * size**-0.5)

    def write(self, layers: Layers, config: Config) -> None:
        scale, size = layers.get(self.path), layers.get(f"{ATTEND}.mixer.head_size")
        factor = 1.0 if scale is None else scale * size**0.5
        # Of the neighbours, the one that gives the same scale again.
        near = (factor, math.nextafter(factor, 0.0), math.nextafter(factor, math.inf))
        config["key_multiplier"] = next((n for n in near if n * size**-0.5 == scale), factor)


class GatedNorm:
    """`mamba_rms_norm` and `mamba_norm_before_gate`: whether the gate comes with a norm, and before or after it."""

    path = f"{STATE}.mixer.norm"

    def read(self, config: Config, draft: Draft) -> None:
        order = "norm_first" if config.get("mamba_norm_before_gate", True) else "gate_first"
        draft.put(self.path, order if config.get("mamba_rms_norm", False) else None)

    def write(self, layers: Layers, config: Config) -> None:
        order = layers.get(self.path)
        config |= {"mamba_rms_norm": order is not None, "mamba_norm_before_gate": order != "gate_first"}


def plain(multipliers: list[float] | None) -> list[float] | None:
    """None for factors that are all one."""
    return multipliers if multipliers and any(factor != 1 for factor in multipliers) else None


FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={
        "layer": {
            "mixer": {
                "kind": "parallel",
                "first": {"mixer": {"kind": "mamba2"}},
                "second": {"mixer": {"kind": "attention"}},
            }
        }
    },
    keys=(
        Depth("num_hidden_layers", 32),
        *attended(ATTEND, f"{STATE}.mixer.norm_epsilon"),
        *duality_keys(STATE, inner=("mamba_d_ssm", 1024)),
        key("mamba_proj_bias", f"{STATE}.mixer.bias", default=False),
        key("projectors_bias", f"{STATE}.mixer.output_bias", default=False),
        GatedNorm(),
        Rotary(scope=ATTEND),
        KeyMultiplier(),
        key("ssm_multipliers", f"{STATE}.mixer.multipliers", default=None, to=plain, back=lambda m: m or [1.0] * 5),
        key("ssm_in_multiplier", f"{STATE}.input_multiplier", default=1.0),
        key("ssm_out_multiplier", f"{STATE}.output_multiplier", default=1.0),
        key("attention_in_multiplier", f"{ATTEND}.input_multiplier", default=1.0),
        key("attention_out_multiplier", f"{ATTEND}.output_multiplier", default=1.0),
        OneEach("mlp_multipliers", ("block.ffn.gate_multiplier", "block.ffn.output_multiplier")),
        key("embedding_multiplier", "embedding_multiplier", default=1.0),
        key("lm_head_multiplier", "logit_multiplier", default=1.0),
    ),
    tensors=TENSORS,
    layer_tensors=(
        *FEED_FORWARD,
        *duality("mamba", "mixer.inner.first"),
        *attention("self_attn", "mixer.inner.second"),
    ),
)
