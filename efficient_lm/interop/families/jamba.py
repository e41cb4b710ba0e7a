"""Jamba (Lieber et al. 2024): Mamba with norms of Δ, B and C; attention once in a period, and experts in another."""

from operator import add

from efficient_lm.interop.description import Tensor, norm
from efficient_lm.interop.experts import FFN_KINDS, Balanced, gated_experts, router
from efficient_lm.interop.families.bamba import NORMS, TENSORS, activated
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import MODEL, RMS, attention, gated_mlp, shape
from efficient_lm.interop.families.mamba import rank, selective, whole
from efficient_lm.interop.keys import Always, Config, Spread, count, key, merged
from efficient_lm.interop.placement import Pattern, crossed, every

INNER_NORMS: tuple[Tensor, ...] = (
    *norm("mamba.dt_layernorm", "mixer.inner.dt_norm"),
    *norm("mamba.b_layernorm", "mixer.inner.input_norm"),
    *norm("mamba.c_layernorm", "mixer.inner.output_norm"),
)


def _names(config: Config) -> list[str]:
    period, offset = count(config, "attn_layer_period", 8), count(config, "attn_layer_offset", 4, least=0)
    layers = count(config, "num_hidden_layers", 32)
    return ["attend" if index % period == offset else "recur" for index in range(layers)]


def _keys(names: list[str]) -> Config:
    period, offset = every([layer for layer, name in enumerate(names) if name == "attend"], len(names))
    return {"num_hidden_layers": len(names), "attn_layer_period": period, "attn_layer_offset": offset}


def _experts(config: Config) -> list[str]:
    period, offset = count(config, "expert_layer_period", 2), count(config, "expert_layer_offset", 1, least=0)
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    several = count(config, name, 16, least=0) > 1
    layers = range(count(config, "num_hidden_layers", 32))
    return ["sparse" if several and layer % period == offset else "dense" for layer in layers]


def _expert_keys(names: list[str]) -> Config:
    period, offset = every([layer for layer, name in enumerate(names) if name == "sparse"], len(names))
    number = {} if "sparse" in names else {"num_experts": 1, "num_local_experts": 1}
    return {"expert_layer_period": period, "expert_layer_offset": offset, **number}


MIXERS = {
    "recur": {"mixer": {"kind": "mamba", "inner_norm": RMS}},
    "attend": {"mixer": {"kind": "attention", "position": {"kind": "none"}}},
}
MIXER_TENSORS = {"recur": (*NORMS, *selective("mamba"), *INNER_NORMS), "attend": (*NORMS, *attention())}
FFNS = ("dense.ffn", "sparse.ffn.expert")
FFN_TENSORS = {
    "sparse": (*router("feed_forward.router"), *gated_experts("feed_forward.experts.{}")),
    "dense": gated_mlp("feed_forward"),
}

FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds=crossed(MIXERS, FFN_KINDS, merged),
    keys=(
        Pattern(_names, _keys),
        Pattern(_experts, _expert_keys, word=1),
        *shape(65536, 4096, 32, 8, 14336, "attend", FFNS),
        key("num_experts", "sparse.ffn.experts", default=16, others=("num_local_experts",)),
        key("num_experts_per_tok", "sparse.ffn.top_k", default=2),
        Always({"sparse.ffn.router": {"scores": "softmax", "normalize": False}}),
        Balanced(0.001, "sparse"),
        key("head_dim", "attend.mixer.head_size", default=None),
        key("mamba_expand", "recur.mixer.expand", default=2.0, back=whole),
        key("mamba_d_state", "recur.mixer.state_size", default=16),
        rank("mamba_dt_rank", "recur.mixer.rank"),
        key("mamba_d_conv", "recur.mixer.convolution", default=4),
        key("mamba_conv_bias", "recur.mixer.convolution_bias", default=True),
        key("mamba_proj_bias", "recur.mixer.bias", "recur.mixer.output_bias", default=False),
        activated("recur", *FFNS),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "recur.mixer.inner_norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=False),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=crossed(MIXER_TENSORS, FFN_TENSORS, add),
)
