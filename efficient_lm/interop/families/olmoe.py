"""OLMoE (Muennighoff et al. 2024): experts in every layer, queries and keys normed over all heads together."""

from efficient_lm.interop.experts import Balanced, gated_experts, router
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BIASES,
    BLOCK,
    MODEL,
    PRE_NORMS,
    QK_NORM,
    RMS,
    TENSORS,
    common,
    shape,
)
from efficient_lm.interop.keys import key, merged
from efficient_lm.interop.placement import Depth

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    model=MODEL,
    block=merged(
        BLOCK,
        {
            "mixer": {"qk_norm": RMS, "qk_norm_over": "all"},
            "ffn": {"kind": "moe", "router": {"scores": "softmax"}},
        },
    ),
    keys=(
        *shape(50304, 2048, 16, None, 2048, ffns=["block.ffn.expert"]),
        Depth("num_hidden_layers", 16),
        BIASES,
        key("clip_qkv", "block.mixer.clip", default=None),
        key("num_experts", "block.ffn.experts", default=64, others=("num_local_experts",)),
        key("num_experts_per_tok", "block.ffn.top_k", default=8),
        key("norm_topk_prob", "block.ffn.router.normalize", default=False),
        Balanced(0.01),
        *common(1e-5, "block.mixer.qk_norm.epsilon", ffns=["block.ffn.expert"]),
    ),
    tensors=TENSORS,
    layer_tensors=(
        *ATTENTION,
        *QK_NORM,
        *router("mlp.gate"),
        *gated_experts("mlp.experts.{}"),
        *PRE_NORMS,
    ),
)
