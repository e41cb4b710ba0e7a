"""LFM2 (Liquid AI 2025): gated short convolutions, and attention with normed queries and keys in a few layers."""

from efficient_lm.interop.description import fused, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import RMS, shape
from efficient_lm.interop.keys import Config, Draft, Layers, Spread, count, key, lookup
from efficient_lm.interop.placement import listed
from efficient_lm.interop.rotary import Rotary

KINDS = {"conv": "convolve", "full_attention": "attend"}
"""Type of a layer → name of our block."""


def layer_type(config: Config, layer: int) -> str:
    """The older key lists the layers that attend; without it all do."""
    attending = config.get("full_attn_idxs")
    return "full_attention" if attending is None or layer in attending else "conv"


class Hidden:
    """Units of the channel mixer: as stated, or adjusted to two thirds and rounded up to a multiple.

    The older name prevails, and is written too, so that none is left that says something else.
    """

    def read(self, config: Config, draft: Draft) -> None:
        name = "block_ff_dim" if "block_ff_dim" in config else "intermediate_size"
        hidden = count(config, name, 12288)
        if lookup(config, "block_auto_adjust_ff_dim", True):
            hidden = int(2 * hidden / 3)
            multiplier, multiple = config.get("block_ffn_dim_multiplier", 1.0), count(config, "block_multiple_of", 256)
            if multiplier is not None:
                hidden = -(-int(multiplier * hidden) // multiple) * multiple
        draft.put("block.ffn.hidden", hidden)

    def write(self, layers: Layers, config: Config) -> None:
        hidden = layers.get("block.ffn.hidden")
        config |= {"intermediate_size": hidden, "block_ff_dim": hidden, "block_auto_adjust_ff_dim": False}


class Tied:
    """`tie_word_embeddings`, under its older name too, which prevails."""

    def read(self, config: Config, draft: Draft) -> None:
        draft.put("tied", config.get("tie_embedding", config.get("tie_word_embeddings", True)))

    def write(self, layers: Layers, config: Config) -> None:
        config |= {"tie_word_embeddings": layers.get("tied"), "tie_embedding": layers.get("tied")}


COMMON = (
    *norm("operator_norm", "mixer.input_norm"),
    *norm("ffn_norm", "ffn.input_norm"),
    *linear("feed_forward.w1", "ffn.inner.gate_up", 0),
    *linear("feed_forward.w3", "ffn.inner.gate_up", 1),
    *linear("feed_forward.w2", "ffn.inner.down"),
)

FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    model={"final_norm": RMS},
    block={"norm": RMS, "ffn": {"kind": "swiglu"}},
    kinds={
        "convolve": {"mixer": {"kind": "short_conv"}},
        "attend": {"mixer": {"kind": "attention", "qk_norm": RMS}},
    },
    keys=(
        *(binding for binding in shape(65536, 2560, 32, 8, 12288, "attend") if binding.name != "intermediate_size"),
        Hidden(),
        listed("layer_types", KINDS, layer_type, 32),
        key("head_dim", "attend.mixer.head_size", default=None),
        key("conv_L_cache", "convolve.mixer.convolution", default=3),
        key("conv_bias", "convolve.mixer.bias", default=False),
        key("norm_eps", "final_norm.epsilon", "block.norm.epsilon", "attend.mixer.qk_norm.epsilon", default=1e-5),
        Tied(),
        Rotary(theta=1_000_000.0, scope="attend"),
        Spread(),
    ),
    tensors=(
        *table("model.embed_tokens.weight", "embedding.tokens"),
        *norm("model.embedding_norm", "head.norm"),
        *table("lm_head.weight", "head.weight", "torch"),
    ),
    layer_tensors={
        "convolve": (
            *COMMON,
            *fused("conv.in_proj", [("mixer.inner.branches", None)], "torch"),
            *table("conv.conv.weight", "mixer.inner.convolution.weight", "depthwise"),
            *table("conv.conv.bias", "mixer.inner.convolution.bias", "vector"),
            *linear("conv.out_proj", "mixer.inner.output"),
        ),
        "attend": (
            *COMMON,
            *linear("self_attn.q_proj", "mixer.inner.query"),
            *linear("self_attn.k_proj", "mixer.inner.key_value", 0),
            *linear("self_attn.v_proj", "mixer.inner.key_value", 1),
            *linear("self_attn.out_proj", "mixer.inner.output"),
            *norm("self_attn.q_layernorm", "mixer.inner.query_norm"),
            *norm("self_attn.k_layernorm", "mixer.inner.key_norm"),
        ),
    },
)
