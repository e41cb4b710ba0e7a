"""Qwen3-Next: gated DeltaNet and gated attention, the maps of each recurrent layer fused by head of keys.

Models with experts are refused.
"""

from efficient_lm.interop.description import InterleavedByHead, Rows, Source, Tensor, fused, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, BIASES, GATED_MLP, PRE_NORMS, QK_NORM, TENSORS, shape
from efficient_lm.interop.families.olmo_hybrid import CONVOLUTION, GATED_AND_CONVOLVED, KINDS, SIZES, TAPS
from efficient_lm.interop.keys import Config, Dense, Key, Named, Spread, count, key, listed
from efficient_lm.interop.rotary import Rotary

RMS = {"kind": "rmsnorm", "one_plus": True}
DEPTH = 48


def layer_type(config: Config, layer: int) -> str:
    """Every fourth layer attends, unless the older key says otherwise."""
    return "linear_attention" if (layer + 1) % config.get("full_attention_interval", 4) else "full_attention"


def experts(config: Config) -> str | None:
    """The first layer that has experts, and the key that would take them out."""
    dense, step = config.get("mlp_only_layers") or [], count(config, "decoder_sparse_step", 1)
    layers = range(count(config, "num_hidden_layers", DEPTH)) if config.get("num_experts", 512) else []
    sparse = [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    return f"mlp_only_layers: {dense} leaves experts in layer {sparse[0]}" if sparse else None


def scoped(bias: Key) -> Key:
    """The same key, of the layers that attend."""
    return key(bias.name, *(path.replace("block.", "attend.") for path in bias.paths), default=bias.default)


IN_MAPS = (
    Source("mixer.inner.query_key.weight", 0),
    Source("mixer.inner.query_key.weight", 1),
    Source("mixer.inner.value.weight"),
    Source("mixer.inner.gate.weight"),
)
HEAD_MAPS = (Source("mixer.inner.beta.weight"), Source("mixer.inner.decay.weight"))
BY_KEY_HEAD = InterleavedByHead("groups")

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    model={"final_norm": RMS},
    block={"norm": RMS},
    kinds={
        "recurrent": {"mixer": {"kind": "gated_delta_net"}},
        "attend": {"mixer": {"kind": "attention", "output_gate": True, "qk_norm": RMS}},
    },
    keys=(
        *shape(151936, 2048, 16, 2, 5632, "attend"),
        listed("layer_types", KINDS, layer_type, DEPTH),
        Dense(experts, lambda layers: {"mlp_only_layers": list(range(layers)), "decoder_sparse_step": 1}),
        key("head_dim", "attend.mixer.head_size", default=256),
        *SIZES,
        TAPS,
        scoped(BIASES),
        Named("hidden_act", GATED_AND_CONVOLVED, "silu"),
        key(
            "rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "attend.mixer.qk_norm.epsilon",
            "recurrent.mixer.epsilon", default=1e-6,
        ),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(fraction_key="partial_rotary_factor", fraction=0.25, scope="attend"),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recurrent": (
            Tensor("linear_attn.in_proj_qkvz.weight", IN_MAPS, "torch", BY_KEY_HEAD),
            Tensor(
                "linear_attn.in_proj_ba.weight", HEAD_MAPS, "torch", BY_KEY_HEAD, by="mixer.inner.query_key.weight"
            ),
            Tensor("linear_attn.conv1d.weight", CONVOLUTION, "depthwise", Rows()),
            *table("linear_attn.A_log", "mixer.inner.A_log"),
            *table("linear_attn.dt_bias", "mixer.inner.dt_bias"),
            *norm("linear_attn.norm", "mixer.inner.norm"),
            *linear("linear_attn.out_proj", "mixer.inner.output"),
            *GATED_MLP,
            *PRE_NORMS,
        ),
        "attend": (
            *fused(
                "self_attn.q_proj", [("mixer.inner.query", None), ("mixer.inner.gate", None)], "torch",
                InterleavedByHead(),
            ),
            *(tensor for tensor in ATTENTION if ".q_proj." not in tensor.name),
            *QK_NORM,
            *GATED_MLP,
            *PRE_NORMS,
        ),
    },
)  # fmt: skip
