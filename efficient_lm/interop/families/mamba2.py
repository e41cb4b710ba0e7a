"""Mamba-2 (Dao & Gu 2024): one layer of state space duality after the other, and no channel mixer."""

import math
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import Rows, Tensor, fused, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.mamba import MODEL, RMS, TENSORS, convolution, convolved
from efficient_lm.interop.keys import ABSENT, Binding, Config, Draft, Inexpressible, Layers, Spread, count, key
from efficient_lm.interop.placement import Depth

UNBOUNDED = {"__float__": "Infinity"}
"""How transformers 5 writes infinity; older configs have the literal, which is no JSON."""


def duality(theirs: str, ours: str = "mixer.inner") -> tuple[Tensor, ...]:
    """The tensors of a Mamba-2 mixer whose names begin with `theirs`."""
    maps = [(f"{ours}.{name}", None) for name in ("gate_input", "input_output", "dt")]
    return (
        *fused(f"{theirs}.in_proj", maps, "torch", Rows()),
        *convolution(theirs, f"{ours}.convolution", f"{ours}.input_output_convolution"),
        *table(f"{theirs}.dt_bias", f"{ours}.dt_bias"),
        *table(f"{theirs}.A_log", f"{ours}.A_log"),
        *table(f"{theirs}.D", f"{ours}.D"),
        *norm(f"{theirs}.norm", f"{ours}.norm"),
        *linear(f"{theirs}.out_proj", f"{ours}.output"),
    )


@dataclass(frozen=True)
class Heads:
    """The number and the size of heads, and keys that state their product once more.

    Attributes:
        heads, size, expand: key and default of the number, the size (``auto``: what is left) and the factor of the
            width that is their product.
        width: default width.
        inner: key and default of the product itself, which comes before the factor unless it is null.
        scope: the kind of layer that has them.
    """

    heads: tuple[str, int]
    size: tuple[str, int | str]
    expand: tuple[str, int]
    width: int
    inner: tuple[str, int] | None = None
    scope: str = "block"

    def read(self, config: Config, draft: Draft) -> None:
        heads, factor = count(config, *self.heads), config.get(*self.expand)
        inner = config.get(*self.inner) if self.inner else None
        stated = f"{self.inner[0]} = {inner}" if inner else f"{self.expand[0]} * hidden_size"
        inner = inner or int(factor * count(config, "hidden_size", self.width))
        size = config.get(*self.size)
        size = inner // heads if size == "auto" else size
        if heads * size != inner:
            raise ConfigError(f"{self.size[0]}: {heads} heads of {size} are not {stated}, which is {inner}")
        draft.put(f"{self.scope}.mixer.heads", heads)
        draft.put(f"{self.scope}.mixer.head_size", size)

    def write(self, layers: Layers, config: Config) -> None:
        heads, size = (layers.get(f"{self.scope}.mixer.{name}") for name in ("heads", "head_size"))
        if heads is ABSENT:
            # Layers that there are none of must still add up when the config is read.
            heads, size = 1, self.expand[1] * layers.spec.width
        config |= {self.heads[0]: heads, self.size[0]: size}
        if self.inner:
            config[self.inner[0]] = heads * size
            return
        factor, rest = divmod(heads * size, layers.spec.width)
        if rest:
            raise Inexpressible(f"{self.scope}.mixer.expand", layers.get(f"{self.scope}.mixer.expand"))
        config[self.expand[0]] = factor


def step_limit(path: str, name: str = "time_step_limit") -> Binding:
    """The key of the least and the largest Δ."""

    def to(limit: Any) -> Any:
        if limit is None:
            return [0.0, None]
        if not isinstance(limit, list) or len(limit) != 2:
            raise ConfigError(f"{name}: {limit!r} is not a list of the least and the largest step")
        return [limit[0], None if limit[1] in (UNBOUNDED, math.inf) else limit[1]]

    return key(
        name, path, default=None, to=to, back=lambda limit: [limit[0], UNBOUNDED if limit[1] is None else limit[1]]
    )


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    model=MODEL,
    block={"ffn": None, "norm": RMS},
    kinds={"layer": {"mixer": {"kind": "mamba2"}}},
    keys=(
        key("vocab_size", "vocab_size", default=32768),
        key("hidden_size", "width", default=4096),
        Depth("num_hidden_layers", 64),
        Heads(("num_heads", 128), ("head_dim", 64), ("expand", 2), 4096),
        key("n_groups", "block.mixer.groups", default=8),
        key("state_size", "block.mixer.state_size", default=128),
        key("conv_kernel", "block.mixer.convolution", default=4),
        key("use_conv_bias", "block.mixer.convolution_bias", default=True),
        key("use_bias", "block.mixer.bias", "block.mixer.output_bias", default=False),
        step_limit("block.mixer.dt_limit"),
        convolved("hidden_act", "block.mixer.activation"),
        key("layer_norm_epsilon", "final_norm.epsilon", "block.norm.epsilon", "block.mixer.norm_epsilon", default=1e-5),
        key("tie_word_embeddings", "tied", default=False),
        Spread(default=0.1),
    ),
    tensors=TENSORS,
    layer_tensors=(*norm("norm", "mixer.input_norm"), *duality("mixer")),
    layer="backbone.layers.{}.",
    prefix="backbone.",
    dropouts=(),
    ignored=(),
)
