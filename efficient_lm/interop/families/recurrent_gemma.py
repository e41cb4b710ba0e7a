"""RecurrentGemma (Botev et al. 2024): Griffin with Gemma's norms, two recurrent layers to one that sees a window."""

import math

import ml_dtypes
import numpy as np

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.interop.description import linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.keys import ACTIVATIONS, GATED, Config, Draft, Inexpressible, Layers, Named, count, key
from efficient_lm.interop.placement import Pattern
from efficient_lm.interop.rotary import Rotary

RMS = {"kind": "rmsnorm", "one_plus": True}
KINDS = {"recurrent": "recur", "attention": "attend"}
"""Type of a layer → name of our block."""

ACTIVATION = {theirs: {**gated, "recur.mixer.activation": ACTIVATIONS[theirs]} for theirs, gated in GATED.items()}
"""Activation of the channel mixer, which is also that of the recurrent block's gate."""


def names(config: Config) -> list[str]:
    """The kind of each layer: `block_types`, over and over."""
    types = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    for kind in types:
        if kind not in KINDS:
            raise ConfigError(f"block_types: '{kind}' is not supported; {nearest(str(kind), KINDS)}")
    return [KINDS[types[index % len(types)]] for index in range(count(config, "num_hidden_layers", 26))]


def block_types(ours: list[str]) -> Config:
    """The shortest `block_types` that make these kinds."""
    theirs = [next(name for name, kind in KINDS.items() if kind == mine) for mine in ours]
    length = next(n for n in range(1, len(ours) + 1) if all(kind == theirs[i % n] for i, kind in enumerate(theirs)))
    return {"num_hidden_layers": len(ours), "block_types": theirs[:length]}


class Inner:
    """`lru_width`: the width, unless it is given."""

    def read(self, config: Config, draft: Draft) -> None:
        draft.put("recur.mixer.inner", config.get("lru_width") or count(config, "hidden_size", 2560))

    def write(self, layers: Layers, config: Config) -> None:
        if "recur" in layers.kinds:
            config["lru_width"] = layers.get("recur.mixer.inner")


class SoftCap:
    """`logits_soft_cap`, which every model of the family has."""

    def read(self, config: Config, draft: Draft) -> None:
        draft.put("logit_softcap", config.get("logits_soft_cap", 30.0))

    def write(self, layers: Layers, config: Config) -> None:
        cap = layers.get("logit_softcap")
        if cap is None:
            raise Inexpressible("logit_softcap", cap)
        config["logits_soft_cap"] = cap


class EmbeddingMultiplier:
    """The root of the width, which the reference keeps in bfloat16 whatever it computes in."""

    def read(self, config: Config, draft: Draft) -> None:
        root = math.sqrt(count(config, "hidden_size", 2560))
        draft.put("embedding_multiplier", float(np.asarray(root, ml_dtypes.bfloat16)))

    def write(self, layers: Layers, config: Config) -> None:
        """Nothing says it: a spec with another multiplier differs when it is read again."""


COMMON = (
    *norm("temporal_pre_norm", "mixer.input_norm"),
    *norm("channel_pre_norm", "ffn.input_norm"),
    *linear("mlp_block.gate_proj", "ffn.inner.gate_up", 0),
    *linear("mlp_block.up_proj", "ffn.inner.gate_up", 1),
    *linear("mlp_block.down_proj", "ffn.inner.down"),
)

FAMILY = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    model={"final_norm": RMS},
    block={"norm": RMS, "ffn": {"bias": True}},
    kinds={
        "recur": {"mixer": {"kind": "rg_lru", "bias": True}},
        "attend": {"mixer": {"kind": "attention", "output_bias": True}},
    },
    keys=(
        key("vocab_size", "vocab_size", default=256000),
        key("hidden_size", "width", default=2560),
        key("num_attention_heads", "attend.mixer.heads", "recur.mixer.heads", default=10),
        key("num_key_value_heads", "attend.mixer.kv_heads", default=None),
        key("head_dim", "attend.mixer.head_size", default=None),
        key("intermediate_size", "block.ffn.hidden", default=7680, to=lambda both: both // 2, back=lambda n: 2 * n),
        Pattern(names, block_types),
        Inner(),
        key("attention_window_size", "attend.mixer.window", default=2048),
        key("conv1d_width", "recur.mixer.convolution", default=4),
        key("attention_bias", "attend.mixer.bias", default=False),
        Named("hidden_activation", ACTIVATION, "gelu_pytorch_tanh"),
        SoftCap(),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=True),
        EmbeddingMultiplier(),
        Rotary(fraction_key="partial_rotary_factor", fraction=0.5, scope="attend", scalable=False),
    ),
    tensors=(
        *table("model.embed_tokens.weight", "embedding.tokens"),
        *norm("model.final_norm", "head.norm"),
        *table("lm_head.weight", "head.weight", "torch"),
    ),
    layer_tensors={
        "recur": (
            *COMMON,
            *linear("temporal_block.linear_y", "mixer.inner.branches", 0),
            *linear("temporal_block.linear_x", "mixer.inner.branches", 1),
            *linear("temporal_block.linear_out", "mixer.inner.output"),
            *table("temporal_block.conv_1d.weight", "mixer.inner.convolution.weight", "depthwise"),
            *table("temporal_block.conv_1d.bias", "mixer.inner.convolution.bias", "vector"),
            *table("temporal_block.rg_lru.recurrent_param", "mixer.inner.decay", "vector"),
            *table("temporal_block.rg_lru.input_gate_weight", "mixer.inner.input_gate.weight"),
            *table("temporal_block.rg_lru.input_gate_bias", "mixer.inner.input_gate.bias"),
            *table("temporal_block.rg_lru.recurrent_gate_weight", "mixer.inner.recurrence_gate.weight"),
            *table("temporal_block.rg_lru.recurrent_gate_bias", "mixer.inner.recurrence_gate.bias"),
        ),
        "attend": (
            *COMMON,
            *linear("temporal_block.q_proj", "mixer.inner.query"),
            *linear("temporal_block.k_proj", "mixer.inner.key_value", 0),
            *linear("temporal_block.v_proj", "mixer.inner.key_value", 1),
            *linear("temporal_block.o_proj", "mixer.inner.output"),
        ),
    },
)
