"""Bamba (IBM, Princeton, UIUC 2024): Mamba-2 layers with a few of attention between them, each with a gated MLP."""

from efficient_lm.interop.description import Tensor, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import MODEL, RMS, attention, gated_mlp, shape
from efficient_lm.interop.families.mamba2 import Heads, duality, step_limit
from efficient_lm.interop.keys import ACTIVATIONS, Binding, Config, Named, Spread, count, gated, key
from efficient_lm.interop.placement import Pattern
from efficient_lm.interop.rotary import Rotary

TENSORS: tuple[Tensor, ...] = (
    *table("model.embed_tokens.weight", "embedding.tokens"),
    *norm("model.final_layernorm", "head.norm"),
    *table("lm_head.weight", "head.weight", "torch"),
)
NORMS: tuple[Tensor, ...] = (
    *norm("input_layernorm", "mixer.input_norm"),
    *norm("pre_ff_layernorm", "ffn.input_norm"),
)
FEED_FORWARD: tuple[Tensor, ...] = (*NORMS, *gated_mlp("feed_forward"))


def activated(scope: str, *ffns: str) -> Named:
    """`hidden_act`: of the channel mixers at these paths (every layer's unless given), and after a convolution."""
    kinds = gated(*(ffns or ["block.ffn"]))
    meanings = {theirs: {**kinds[theirs], f"{scope}.mixer.activation": ours} for theirs, ours in ACTIVATIONS.items()}
    return Named("hidden_act", meanings, "silu")


def duality_keys(scope: str, **inner: tuple[str, int]) -> tuple[Binding, ...]:
    """What Bamba and Falcon-H1 name alike of their Mamba-2 layers."""
    return (
        Heads(("mamba_n_heads", 128), ("mamba_d_head", "auto"), ("mamba_expand", 2), 4096, scope=scope, **inner),
        key("mamba_n_groups", f"{scope}.mixer.groups", default=1),
        key("mamba_d_state", f"{scope}.mixer.state_size", default=256),
        key("mamba_d_conv", f"{scope}.mixer.convolution", default=4),
        key("mamba_conv_bias", f"{scope}.mixer.convolution_bias", default=True),
        step_limit(f"{scope}.mixer.dt_limit"),
        activated(scope),
    )


def attended(scope: str, *norms: str) -> tuple[Binding, ...]:
    """What Bamba and Falcon-H1 name alike besides; `norms` share the epsilon of the blocks'."""
    return (
        *shape(128000, 4096, 32, 8, 14336, scope=scope),
        key("head_dim", f"{scope}.mixer.head_size", default=None),
        key("attention_bias", f"{scope}.mixer.bias", f"{scope}.mixer.output_bias", default=False),
        key("mlp_bias", "block.ffn.bias", default=False),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", *norms, default=1e-5),
        key("tie_word_embeddings", "tied", default=False),
        Spread(),
    )


def _names(config: Config) -> list[str]:
    attending = config.get("attn_layer_indices") or []
    return ["attend" if index in attending else "recur" for index in range(count(config, "num_hidden_layers", 32))]


def _keys(names: list[str]) -> Config:
    attending = [index for index, name in enumerate(names) if name == "attend"]
    return {"num_hidden_layers": len(names), "attn_layer_indices": attending}


FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={"recur": {"mixer": {"kind": "mamba2"}}, "attend": {"mixer": {"kind": "attention"}}},
    keys=(
        Pattern(_names, _keys),
        *attended("attend", "recur.mixer.norm_epsilon"),
        *duality_keys("recur"),
        key("mamba_proj_bias", "recur.mixer.bias", "recur.mixer.output_bias", default=False),
        Rotary(fraction_key="partial_rotary_factor", fraction=0.5, scope="attend"),
    ),
    tensors=TENSORS,
    layer_tensors={"recur": (*FEED_FORWARD, *duality("mamba")), "attend": (*FEED_FORWARD, *attention())},
)
