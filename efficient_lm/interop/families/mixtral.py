"""Mixtral (Jiang et al. 2024): Mistral with experts in every layer."""

from efficient_lm.interop.experts import NOISE, SOFTMAX, Balanced, gated_experts, router
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, BLOCK, HEAD_SIZE, MODEL, PRE_NORMS, TENSORS, common, shape
from efficient_lm.interop.keys import key, merged
from efficient_lm.interop.placement import Depth

EXPERTS = (
    *router("block_sparse_moe.gate"),
    *gated_experts("block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
)

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"ffn": {"kind": "moe", "router": SOFTMAX}}),
    keys=(
        *shape(32000, 4096, 32, 8, 14336, ffns=["block.ffn.expert"]),
        Depth("num_hidden_layers", 32),
        HEAD_SIZE,
        key("sliding_window", "block.mixer.window", default=None),
        key("num_local_experts", "block.ffn.experts", default=8, others=("num_experts",)),
        key("num_experts_per_tok", "block.ffn.top_k", default=2),
        Balanced(0.001),
        *common(1e-5, ffns=["block.ffn.expert"], theta=1_000_000.0),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *EXPERTS, *PRE_NORMS),
    dropouts=("attention_dropout", *NOISE),
)
