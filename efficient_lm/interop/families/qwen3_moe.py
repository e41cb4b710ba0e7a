"""Qwen 3's mixture of experts (Yang et al. 2025): Qwen 3 with experts in all layers but those that are listed."""

from efficient_lm.interop.experts import FFN_KINDS, Balanced, gated_experts, router, stepped
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BIASES,
    BLOCK,
    GATED_MLP,
    MODEL,
    PRE_NORMS,
    QK_NORM,
    RMS,
    TENSORS,
    common,
    shape,
)
from efficient_lm.interop.keys import Always, Config, Draft, Layers, key, merged

FFNS = ("dense.ffn", "sparse.ffn.expert")
NUMBER = ("num_local_experts",)
"""The name that transformers 5 has for `num_experts`."""


class Window:
    """`sliding_window`, in every layer, where `use_sliding_window` turns it on."""

    def read(self, config: Config, draft: Draft) -> None:
        draft.put(
            "block.mixer.window", config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        )

    def write(self, layers: Layers, config: Config) -> None:
        window = layers.get("block.mixer.window")
        config |= {"sliding_window": window, "use_sliding_window": window is not None}


ATTEND = (*ATTENTION, *QK_NORM, *PRE_NORMS)

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"mixer": {"qk_norm": RMS}}),
    kinds=FFN_KINDS,
    keys=(
        *shape(151936, 2048, 32, 4, 6144, ffns=["dense.ffn"]),
        stepped(24, 128, NUMBER),
        key("head_dim", "block.mixer.head_size", default=None),
        BIASES,
        Window(),
        key("num_experts", "sparse.ffn.experts", default=128, others=NUMBER),
        key("num_experts_per_tok", "sparse.ffn.top_k", default=8),
        key("moe_intermediate_size", "sparse.ffn.expert.hidden", default=768),
        Always({"sparse.ffn.router.scores": "softmax"}),
        key("norm_topk_prob", "sparse.ffn.router.normalize", default=False),
        Balanced(0.001, "sparse"),
        *common(1e-6, "block.mixer.qk_norm.epsilon", ffns=FFNS),
    ),
    tensors=TENSORS,
    layer_tensors={
        "sparse": (*ATTEND, *router("mlp.gate"), *gated_experts("mlp.experts.{}")),
        "dense": (*ATTEND, *GATED_MLP),
    },
)
