"""Kimi Linear (Kimi team 2025): Kimi delta attention, latent attention without positions now and then, and experts."""

from operator import add

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import linear, renamed, table
from efficient_lm.interop.experts import CORRECTED, FFN_KINDS, SIGMOID, Shared, grouped
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.deepseek_v3 import LATENT, LATENT_NORM, latent
from efficient_lm.interop.families.llama import GATED_MLP, MODEL, PRE_NORMS, RMS, TENSORS, gated_mlp
from efficient_lm.interop.families.mixtral import EXPERTS
from efficient_lm.interop.families.olmo_hybrid import KINDS, delta_rule, gated_and_convolved
from efficient_lm.interop.keys import Always, Config, Draft, Layers, Only, Spread, key, mapping, merged
from efficient_lm.interop.placement import crossed, listed

DEPTH = 27
NESTED = {
    "linear_head_dim": ("head_dim", 128, ("key_size", "value_size", "rank")),
    "linear_num_heads": ("num_heads", 32, ("heads", "key_heads")),
    "linear_conv_kernel_dim": ("short_conv_kernel_size", 4, ("convolution",)),
}
"""Size of the recurrent layers → its older name in `linear_attn_config`, default, and our names."""


def layer_type(config: Config, layer: int) -> str:
    """By the lists of `linear_attn_config`, counted from 1; else every fourth layer attends, but not the first."""
    lists = mapping(config, "linear_attn_config")
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
        nested = mapping(config, "linear_attn_config")
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
                nested[name] = [index + 1 for index, found in enumerate(layers.words(0)) if found == kind]
            config["linear_attn_config"] = nested


def ffn_type(config: Config, layer: int) -> str:
    """The older key says how many layers at the beginning have no experts."""
    return "dense" if layer < config.get("first_k_dense_replace", 1) else "sparse"


OTHER_NAMES = {"n_group": "num_expert_group", "norm_topk_prob": "moe_renormalize"}
"""Names that keys of other families have in this one."""

MIXERS = {
    "recurrent": {"mixer": {"kind": "kda"}},
    "attend": {"mixer": {"kind": "multi_latent", "position": {"kind": "none"}, "norm": LATENT_NORM}},
}
MIXER_TENSORS = {
    "recurrent": (
        *delta_rule("self_attn"),
        *linear("self_attn.f_a_proj", "mixer.inner.decay.down"),
        *linear("self_attn.f_b_proj", "mixer.inner.decay.up"),
        *linear("self_attn.g_a_proj", "mixer.inner.gate.down"),
        *linear("self_attn.g_b_proj", "mixer.inner.gate.up"),
        *table("self_attn.A_log", "mixer.inner.A_log", "by_head"),
        *table("self_attn.dt_bias", "mixer.inner.dt_bias", "vector"),
        *PRE_NORMS,
    ),
    "attend": (*LATENT, *PRE_NORMS),
}
FFNS = ("dense.ffn", "sparse.ffn.expert")
FFN_TENSORS = {
    "sparse": (*EXPERTS, *gated_mlp("block_sparse_moe.shared_experts", "ffn.inner.shared")),
    "dense": renamed(GATED_MLP, ("mlp.", "block_sparse_moe.")),
}

FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds=crossed(MIXERS, FFN_KINDS, merged),
    keys=(
        key("vocab_size", "vocab_size", default=163840),
        key("hidden_size", "width", default=2304),
        key("intermediate_size", "dense.ffn.hidden", default=9216),
        listed("layer_types", KINDS, layer_type, DEPTH),
        listed("mlp_layer_types", {"dense": "dense", "sparse": "sparse"}, ffn_type, DEPTH, word=1),
        Sizes(),
        *latent("attend", 32, None),
        gated_and_convolved(*FFNS),
        Always({"sparse.ffn.router": SIGMOID, "sparse.ffn.balance": CORRECTED}),
        key("num_local_experts", "sparse.ffn.experts", default=256, others=("num_experts",)),
        key("num_experts_per_tok", "sparse.ffn.top_k", default=8, others=("num_experts_per_token",)),
        key("moe_intermediate_size", "sparse.ffn.expert.hidden", default=1024),
        *grouped("sparse", (1, 1), 2.446, lambda name: (OTHER_NAMES[name],)),
        Only("moe_router_activation_func", ("sigmoid",), "sigmoid"),
        Only("moe_layer_freq", (1,), 1),
        Only("mla_use_nope", (True,), True),
        Shared("n_shared_experts", 1, "sparse", units=False, others=("num_shared_experts",)),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "recurrent.mixer.epsilon", default=1e-5),
        # The reference has a head of its own whatever this says.
        Only("tie_word_embeddings", (False, True), False),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=crossed(MIXER_TENSORS, FFN_TENSORS, add),
)
