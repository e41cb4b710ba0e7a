"""OLMo Hybrid: gated DeltaNet in most layers, normed on its way in, and OLMo 2's attention, normed on its way out."""

from efficient_lm.interop.description import Rows, Source, Tensor, linear, norm, renamed, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, GATED_MLP, MODEL, QK_NORM, RMS, TENSORS, shape
from efficient_lm.interop.keys import ACTIVATIONS, Config, Draft, Layers, Named, Spread, count, gated, key
from efficient_lm.interop.placement import listed
from efficient_lm.interop.rotary import Rotary

KINDS = {"linear_attention": "recurrent", "full_attention": "attend"}
"""Type of a layer → name of our block."""


def gated_and_convolved(*ffns: str) -> Named:
    """`hidden_act`: of the gated channel mixers at these paths, and after short convolutions."""
    meanings = gated(*ffns)
    for name, ours in ACTIVATIONS.items():
        meanings[name]["recurrent.mixer.activation"] = ours
    return Named("hidden_act", meanings, "silu")


def layer_type(config: Config, layer: int) -> str:
    """Every fourth layer attends, and the last one where there are fewer."""
    last = count(config, "num_hidden_layers", 32) - 1
    return "full_attention" if layer % 4 == 3 or layer == last < 3 else "linear_attention"


class Sizes:
    """Sizes of the recurrent layers; those that are not given follow from the others."""

    def read(self, config: Config, draft: Draft) -> None:
        attending = count(config, "num_attention_heads", 30)
        key_heads = config.get("linear_num_key_heads") or attending
        key_size = config.get("linear_key_head_dim") or int(0.75 * count(config, "hidden_size", 3840) / key_heads)
        draft.put("recurrent.mixer.heads", config.get("linear_num_value_heads") or attending)
        draft.put("recurrent.mixer.key_heads", key_heads)
        draft.put("recurrent.mixer.key_size", key_size)
        draft.put("recurrent.mixer.value_size", config.get("linear_value_head_dim") or 2 * key_size)

    def write(self, layers: Layers, config: Config) -> None:
        for binding in SIZES:
            binding.write(layers, config)


SIZES = (
    key("linear_num_value_heads", "recurrent.mixer.heads", default=32),
    key("linear_num_key_heads", "recurrent.mixer.key_heads", default=16),
    key("linear_key_head_dim", "recurrent.mixer.key_size", default=128),
    key("linear_value_head_dim", "recurrent.mixer.value_size", default=128),
)
TAPS = key("linear_conv_kernel_dim", "recurrent.mixer.convolution", default=4)

CONVOLUTION = (Source("mixer.inner.query_key_convolution.weight"), Source("mixer.inner.value_convolution.weight"))


def convolutions(theirs: str) -> tuple[Tensor]:
    """The taps of queries, keys and values, published in three tensors whose names begin with `theirs`."""
    query_key, value = CONVOLUTION
    sources = (Source(query_key.path, 0), Source(query_key.path, 1), value)
    names = tuple(f"{theirs}.{letter}_conv1d.weight" for letter in "qkv")
    return (Tensor(f"{theirs}.conv1d.weight", sources, "depthwise", Rows(), pieces=names),)


def delta_rule(theirs: str) -> tuple[Tensor, ...]:
    """The tensors that gated DeltaNet and Kimi delta attention have in common; names begin with `theirs`."""
    return (
        *linear(f"{theirs}.q_proj", "mixer.inner.query_key", 0),
        *linear(f"{theirs}.k_proj", "mixer.inner.query_key", 1),
        *linear(f"{theirs}.v_proj", "mixer.inner.value"),
        *linear(f"{theirs}.b_proj", "mixer.inner.beta"),
        *linear(f"{theirs}.o_proj", "mixer.inner.output"),
        *norm(f"{theirs}.o_norm", "mixer.inner.norm"),
        *convolutions(theirs),
    )


FAMILY = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={
        # The reference norms the heads' output with an epsilon of its own.
        "recurrent": {"norm_position": "pre", "mixer": {"kind": "gated_delta_net", "epsilon": 1e-5}},
        "attend": {"norm_position": "output", "mixer": {"kind": "attention", "qk_norm": RMS, "qk_norm_over": "all"}},
    },
    keys=(
        *shape(100352, 3840, 30, None, 11008, "attend"),
        listed("layer_types", KINDS, layer_type, 32),
        Sizes(),
        TAPS,
        key("linear_allow_neg_eigval", "recurrent.mixer.negative_eigenvalues", default=True),
        key("attention_bias", "attend.mixer.bias", "attend.mixer.output_bias", default=False),
        gated_and_convolved("block.ffn"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "attend.mixer.qk_norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(scope="attend", optional=True),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recurrent": (
            *delta_rule("linear_attn"),
            *linear("linear_attn.a_proj", "mixer.inner.decay"),
            *linear("linear_attn.g_proj", "mixer.inner.gate"),
            *table("linear_attn.A_log", "mixer.inner.A_log"),
            *table("linear_attn.dt_bias", "mixer.inner.dt_bias"),
            *GATED_MLP,
            *renamed(norm("attention_layer_norm", "mixer.input_norm"), ("attention_layer_norm", "input_layernorm")),
            *renamed(
                norm("feedforward_layer_norm", "ffn.input_norm"), ("feedforward_layer_norm", "post_attention_layernorm")
            ),
        ),
        "attend": (
            *ATTENTION,
            *QK_NORM,
            *GATED_MLP,
            *renamed(
                norm("post_attention_layernorm", "mixer.output_norm"),
                ("post_attention_layernorm", "feedforward_layer_norm"),
            ),
            *norm("post_feedforward_layernorm", "ffn.output_norm"),
        ),
    },
)
