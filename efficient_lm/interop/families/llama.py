"""Llama (Touvron et al. 2023), and what its many relatives share with it."""

from collections.abc import Sequence

from efficient_lm.interop.description import Tensor, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.keys import Binding, Named, Spread, gated, key
from efficient_lm.interop.placement import Depth
from efficient_lm.interop.rotary import Rotary

RMS = {"kind": "rmsnorm"}
MODEL = {"final_norm": RMS}
BLOCK = {"mixer": {"kind": "attention"}, "norm": RMS}

TENSORS: tuple[Tensor, ...] = (
    *table("model.embed_tokens.weight", "embedding.tokens"),
    *norm("model.norm", "head.norm"),
    *table("lm_head.weight", "head.weight", "torch"),
)


def attention(theirs: str = "self_attn", ours: str = "mixer.inner") -> tuple[Tensor, ...]:
    """The maps of an attention whose names begin with `theirs`."""
    return (
        *linear(f"{theirs}.q_proj", f"{ours}.query"),
        *linear(f"{theirs}.k_proj", f"{ours}.key_value", 0),
        *linear(f"{theirs}.v_proj", f"{ours}.key_value", 1),
        *linear(f"{theirs}.o_proj", f"{ours}.output"),
    )


ATTENTION = attention()
QK_NORM: tuple[Tensor, ...] = (
    *norm("self_attn.q_norm", "mixer.inner.query_norm"),
    *norm("self_attn.k_norm", "mixer.inner.key_norm"),
)


def gated_mlp(theirs: str = "mlp", ours: str = "ffn.inner") -> tuple[Tensor, ...]:
    """The maps of a gated channel mixer whose names begin with `theirs`."""
    return (
        *linear(f"{theirs}.gate_proj", f"{ours}.gate_up", 0),
        *linear(f"{theirs}.up_proj", f"{ours}.gate_up", 1),
        *linear(f"{theirs}.down_proj", f"{ours}.down"),
    )


GATED_MLP = gated_mlp()
PRE_NORMS: tuple[Tensor, ...] = (
    *norm("input_layernorm", "mixer.input_norm"),
    *norm("post_attention_layernorm", "ffn.input_norm"),
)


def shape(
    vocab: int,
    width: int,
    heads: int,
    kv_heads: int | None,
    hidden: int,
    scope: str = "block",
    ffns: Sequence[str] = ("block.ffn",),
) -> tuple[Binding, ...]:
    """Sizes that all relatives name alike, with the defaults of a family.

    Args:
        scope: the kind of layer that attends.
        ffns: paths of the channel mixers that have the hidden size.
    """
    return (
        key("vocab_size", "vocab_size", default=vocab),
        key("hidden_size", "width", default=width),
        key("num_attention_heads", f"{scope}.mixer.heads", default=heads),
        key("num_key_value_heads", f"{scope}.mixer.kv_heads", default=kv_heads),
        key("intermediate_size", *(f"{path}.hidden" for path in ffns), default=hidden),
    )


def common(
    epsilon: float, *norms: str, ffns: Sequence[str] = ("block.ffn",), theta: float = 10000.0
) -> tuple[Binding, ...]:
    """What all relatives name alike besides.

    Args:
        norms: paths of norms that share the epsilon with the blocks'.
        ffns: paths of the channel mixers.
        theta: the default base of rotary positions.
    """
    return (
        Named("hidden_act", gated(*ffns), "silu"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", *norms, default=epsilon),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(theta=theta),
        Spread(),
    )


HEAD_SIZE = key("head_dim", "block.mixer.head_size", default=None)
BIASES = key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=False)

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    model=MODEL,
    block=BLOCK,
    keys=(
        *shape(32000, 4096, 32, None, 11008),
        Depth("num_hidden_layers", 32),
        HEAD_SIZE,
        BIASES,
        key("mlp_bias", "block.ffn.bias", default=False),
        *common(1e-6),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
)
