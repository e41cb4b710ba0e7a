"""Qwen3-Next: gated DeltaNet and gated attention, and experts beside one that sees every token.

The maps of each recurrent layer are fused by head of keys.
"""

from operator import add

from efficient_lm.interop.description import InterleavedByHead, Rows, Source, Tensor, fused, linear, norm, table
from efficient_lm.interop.experts import FFN_KINDS, Balanced, Shared, gated_experts, router, stepped
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BIASES,
    GATED_MLP,
    PRE_NORMS,
    QK_NORM,
    TENSORS,
    gated_mlp,
    shape,
)
from efficient_lm.interop.families.olmo_hybrid import CONVOLUTION, KINDS, SIZES, TAPS, gated_and_convolved
from efficient_lm.interop.keys import Always, Config, Key, Spread, key, merged
from efficient_lm.interop.placement import crossed, listed
from efficient_lm.interop.rotary import Rotary

RMS = {"kind": "rmsnorm", "one_plus": True}
DEPTH = 48


def layer_type(config: Config, layer: int) -> str:
    """Every fourth layer attends, unless the older key says otherwise."""
    return "linear_attention" if (layer + 1) % config.get("full_attention_interval", 4) else "full_attention"


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

MIXERS = {
    "recurrent": {"mixer": {"kind": "gated_delta_net"}},
    "attend": {"mixer": {"kind": "attention", "output_gate": True, "qk_norm": RMS}},
}
MIXER_TENSORS = {
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
        *PRE_NORMS,
    ),
    "attend": (
        *fused(
            "self_attn.q_proj", [("mixer.inner.query", None), ("mixer.inner.gate", None)], "torch",
            InterleavedByHead(),
        ),
        *(tensor for tensor in ATTENTION if ".q_proj." not in tensor.name),
        *QK_NORM,
        *PRE_NORMS,
    ),
}  # fmt: skip
FFNS = ("dense.ffn", "sparse.ffn.expert")
FFN_TENSORS = {
    "sparse": (
        *router("mlp.gate"),
        *gated_experts("mlp.experts.{}"),
        *gated_mlp("mlp.shared_expert", "ffn.inner.shared"),
        *linear("mlp.shared_expert_gate", "ffn.inner.shared_gate"),
    ),
    "dense": GATED_MLP,
}

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    model={"final_norm": RMS},
    block={"norm": RMS},
    kinds=crossed(MIXERS, FFN_KINDS, merged),
    keys=(
        *shape(151936, 2048, 16, 2, 5632, "attend", ["dense.ffn"]),
        listed("layer_types", KINDS, layer_type, DEPTH),
        stepped(DEPTH, 512, word=1),
        key("head_dim", "attend.mixer.head_size", default=256),
        *SIZES,
        TAPS,
        scoped(BIASES),
        gated_and_convolved(*FFNS),
        Always({"sparse.ffn.router.scores": "softmax", "sparse.ffn.shared_gate": True}),
        key("num_experts", "sparse.ffn.experts", default=512),
        key("num_experts_per_tok", "sparse.ffn.top_k", default=10),
        key("moe_intermediate_size", "sparse.ffn.expert.hidden", default=512),
        key("norm_topk_prob", "sparse.ffn.router.normalize", default=True),
        Balanced(0.001, "sparse"),
        Shared("shared_expert_intermediate_size", 512, "sparse"),
        key(
            "rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "attend.mixer.qk_norm.epsilon",
            "recurrent.mixer.epsilon", default=1e-6,
        ),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(fraction_key="partial_rotary_factor", fraction=0.25, scope="attend"),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=crossed(MIXER_TENSORS, FFN_TENSORS, add),
    # The module that predicts further tokens.
    ignored=(r"rotary_emb\.inv_freq$", r"^mtp\."),
)  # fmt: skip
