"""DeepSeek-V3 (DeepSeek-AI 2024): multi-head latent attention, and experts in all layers but the first few."""

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import InterleavedByHead, Rows, Tensor, fused, linear, norm
from efficient_lm.interop.experts import CORRECTED, FFN_KINDS, SIGMOID, Shared, flag, gated_experts, grouped, router
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import GATED_MLP, MODEL, PRE_NORMS, RMS, TENSORS, gated_mlp
from efficient_lm.interop.keys import (
    Always,
    Binding,
    Config,
    Draft,
    Inexpressible,
    Layers,
    Named,
    Only,
    Spread,
    count,
    gated,
    key,
    mapping,
)
from efficient_lm.interop.placement import Pattern
from efficient_lm.interop.rotary import Rotary

LATENT_NORM = {"kind": "rmsnorm", "epsilon": 1e-6}
"""The reference norms latents with an epsilon of its own."""

LATENT: tuple[Tensor, ...] = (
    *linear("self_attn.q_proj", "mixer.inner.query"),
    *linear("self_attn.q_a_proj", "mixer.inner.query_down"),
    *norm("self_attn.q_a_layernorm", "mixer.inner.query_norm"),
    *linear("self_attn.q_b_proj", "mixer.inner.query_up"),
    *fused(
        "self_attn.kv_a_proj_with_mqa", [("mixer.inner.latent", None), ("mixer.inner.rotary_key", None)], "torch",
        Rows(),
    ),
    *norm("self_attn.kv_a_layernorm", "mixer.inner.latent_norm"),
    *fused(
        "self_attn.kv_b_proj", [("mixer.inner.key", None), ("mixer.inner.value", None)], "torch", InterleavedByHead()
    ),
    *linear("self_attn.o_proj", "mixer.inner.output"),
)  # fmt: skip


class KeyValueHeads:
    """`num_key_value_heads`: every head has keys and values of its own."""

    def read(self, config: Config, draft: Draft) -> None:
        heads, stated = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if None not in (heads, stated) and stated != heads:
            raise ConfigError(f"num_key_value_heads: {stated} is not supported; num_attention_heads ({heads}) is")

    def write(self, layers: Layers, config: Config) -> None:
        if "num_attention_heads" in config:
            config["num_key_value_heads"] = config["num_attention_heads"]


def latent(scope: str, heads: int, query_rank: int | None) -> tuple[Binding, ...]:
    """The sizes of latent attention in the layers of a kind, with the defaults of a family."""
    mixer = f"{scope}.mixer"
    return (
        key("num_attention_heads", f"{mixer}.heads", default=heads),
        KeyValueHeads(),
        key("q_lora_rank", f"{mixer}.query_rank", default=query_rank),
        key("kv_lora_rank", f"{mixer}.latent_size", default=512),
        key("qk_nope_head_dim", f"{mixer}.head_size", default=128),
        key("qk_rope_head_dim", f"{mixer}.rotary_size", default=64),
        key("v_head_dim", f"{mixer}.value_size", default=128),
        key("attention_bias", f"{mixer}.bias", f"{mixer}.output_bias", default=False),
    )


class Mscale:
    """`mscale_all_dim`, among the keys of scaled rotary positions."""

    def read(self, config: Config, draft: Draft) -> None:
        stated = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
        if (stated.get("rope_type") or stated.get("type") or "default") != "default":
            draft.put("block.mixer.mscale", stated.get("mscale_all_dim") or 0.0)

    def write(self, layers: Layers, config: Config) -> None:
        value = layers.get("block.mixer.mscale")
        for name in ("rope_parameters", "rope_scaling"):
            if value and config[name]:
                config[name]["mscale_all_dim"] = value


def _names(config: Config) -> list[str]:
    layers, dense = count(config, "num_hidden_layers", 61), count(config, "first_k_dense_replace", 3, least=0)
    return ["dense" if layer < dense else "sparse" for layer in range(layers)]


def _keys(names: list[str]) -> Config:
    dense = names.count("dense")
    if "dense" in names[dense:]:
        raise Inexpressible("layout", names)
    return {"num_hidden_layers": len(names), "first_k_dense_replace": dense}


ATTEND = (*LATENT, *PRE_NORMS)

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    model=MODEL,
    block={"mixer": {"kind": "multi_latent", "norm": LATENT_NORM}, "norm": RMS},
    kinds=FFN_KINDS,
    keys=(
        key("vocab_size", "vocab_size", default=129280),
        key("hidden_size", "width", default=7168),
        key("intermediate_size", "dense.ffn.hidden", default=18432),
        Pattern(_names, _keys),
        *latent("block", 128, 1536),
        Named("hidden_act", gated("dense.ffn", "sparse.ffn.expert"), "silu"),
        Always({"sparse.ffn.router": SIGMOID, "sparse.ffn.balance": CORRECTED}),
        # Keys of the code that the model was published with, which the reference does not read.
        Only("scoring_func", ("sigmoid",), "sigmoid"),
        Only("topk_method", ("noaux_tc",), "noaux_tc"),
        Only("moe_layer_freq", (1,), 1),
        key("n_routed_experts", "sparse.ffn.experts", default=256, others=("num_local_experts",)),
        key("num_experts_per_tok", "sparse.ffn.top_k", default=8),
        key("moe_intermediate_size", "sparse.ffn.expert.hidden", default=2048),
        *grouped("sparse", (8, 4), 2.5),
        Shared("n_shared_experts", 1, "sparse", units=False),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(),
        key("rope_interleave", "block.mixer.position.interleaved", default=True, to=flag),
        Mscale(),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "sparse": (
            *ATTEND,
            *router("mlp.gate"),
            *gated_experts("mlp.experts.{}"),
            *gated_mlp("mlp.shared_experts", "ffn.inner.shared"),
        ),
        "dense": (*ATTEND, *GATED_MLP),
    },
    # The module that predicts a second token lies in a layer after the last.
    ignored=(r"rotary_emb\.inv_freq$", r"^model\.layers\.61\."),
)
