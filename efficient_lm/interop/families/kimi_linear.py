"""Kimi Linear (Kimi team 2025): Kimi delta attention, and latent attention without positions in a few layers.

Models with experts are refused.
"""

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import linear, renamed, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.deepseek_v3 import LATENT, LATENT_NORM, latent
from efficient_lm.interop.families.llama import GATED_MLP, MODEL, PRE_NORMS, RMS, TENSORS
from efficient_lm.interop.families.olmo_hybrid import GATED_AND_CONVOLVED, KINDS, delta_rule
from efficient_lm.interop.keys import Config, Dense, Draft, Layers, Named, Only, Spread, count, key, listed

DEPTH = 27
NESTED = {
    "linear_head_dim": ("head_dim", 128, ("key_size", "value_size", "rank")),
    "linear_num_heads": ("num_heads", 32, ("heads", "key_heads")),
    "linear_conv_kernel_dim": ("short_conv_kernel_size", 4, ("convolution",)),
}
"""Size of the recurrent layers → its older name in `linear_attn_config`, default, and our names."""


def layer_type(config: Config, layer: int) -> str:
    """By the lists of `linear_attn_config`, counted from 1; else every fourth layer attends, but not the first."""
    lists = config.get("linear_attn_config") or {}
    if "full_attn_layers" not in lists or "kda_layers" not in lists:
        return "full_attention" if layer and layer % 4 == 0 else "linear_attention"
    if layer + 1 in lists["kda_layers"]:
        return "linear_attention"
    if layer + 1 in lists["full_attn_layers"]:
        return "full_attention"
    raise ConfigError(f"linear_attn_config: neither full_attn_layers nor kda_layers lists layer {layer + 1}")


class Sizes:
    """Sizes of the recurrent layers, which `linear_attn_config` states for certain."""

    def read(self, config: Config, draft: Draft) -> None:
        nested = config.get("linear_attn_config") or {}
        for name, (older, default, ours) in NESTED.items():
            for path in ours:
                draft.put(f"recurrent.mixer.{path}", nested.get(older, config.get(name, default)))

    def write(self, layers: Layers, config: Config) -> None:
        nested: Config = {}
        for name, (older, _, ours) in NESTED.items():
            one = key(name, *(f"recurrent.mixer.{path}" for path in ours))
            one.write(layers, config)
            nested |= {older: config[name]} if name in config else {}
        if nested:
            for name, kind in (("full_attn_layers", "attend"), ("kda_layers", "recurrent")):
                nested[name] = [index + 1 for index, found in enumerate(layers.kinds) if found == kind]
            config["linear_attn_config"] = nested


def experts(config: Config) -> str | None:
    """The key that puts experts into some layer."""
    layers = count(config, "num_hidden_layers", DEPTH)
    types = config.get("mlp_layer_types")
    if types is not None:
        return "mlp_layer_types: 'sparse'" if "sparse" in types[:layers] else None
    dense = config.get("first_k_dense_replace", 1)
    return f"first_k_dense_replace: {dense} of {layers} layers have no experts" if dense < layers else None


COMMON = (*renamed(GATED_MLP, ("mlp.", "block_sparse_moe.")), *PRE_NORMS)

FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={
        "recurrent": {"mixer": {"kind": "kda"}},
        "attend": {"mixer": {"kind": "multi_latent", "position": {"kind": "none"}, "norm": LATENT_NORM}},
    },
    keys=(
        key("vocab_size", "vocab_size", default=163840),
        key("hidden_size", "width", default=2304),
        key("intermediate_size", "block.ffn.hidden", default=9216),
        listed("layer_types", KINDS, layer_type, DEPTH),
        Dense(experts, lambda layers: {"mlp_layer_types": ["dense"] * layers, "first_k_dense_replace": layers}),
        Sizes(),
        *latent("attend", 32, None),
        Named("hidden_act", GATED_AND_CONVOLVED, "silu"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "recurrent.mixer.epsilon", default=1e-5),
        # The reference has a head of its own whatever this says.
        Only("tie_word_embeddings", (False, True), False),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recurrent": (
            *delta_rule("self_attn"),
            *linear("self_attn.f_a_proj", "mixer.inner.decay.down"),
            *linear("self_attn.f_b_proj", "mixer.inner.decay.up"),
            *linear("self_attn.g_a_proj", "mixer.inner.gate.down"),
            *linear("self_attn.g_b_proj", "mixer.inner.gate.up"),
            *table("self_attn.A_log", "mixer.inner.A_log", "by_head"),
            *table("self_attn.dt_bias", "mixer.inner.dt_bias", "vector"),
            *COMMON,
        ),
        "attend": (*LATENT, *COMMON),
    },
)
