"""Qwen 3 (Yang et al. 2025): a norm on each head's queries and keys, biases optional."""

from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BLOCK,
    GATED_MLP,
    MODEL,
    PRE_NORMS,
    QK_NORM,
    RMS,
    TENSORS,
    shape,
)
from efficient_lm.interop.families.qwen2 import LAYER_TYPES
from efficient_lm.interop.keys import GATED, Named, Spread, key, merged
from efficient_lm.interop.rotary import Rotary

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"mixer": {"qk_norm": RMS}}),
    keys=(
        *shape(151936, 4096, 32, 32, 22016),
        LAYER_TYPES,
        key("head_dim", "block.mixer.head_size", default=128),
        Named("hidden_act", GATED, "silu"),
        key(
            "rms_norm_eps",
            "final_norm.epsilon", "block.norm.epsilon", "block.mixer.qk_norm.epsilon", default=1e-6,
        ),
        key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=False),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *QK_NORM, *GATED_MLP, *PRE_NORMS),
)  # fmt: skip
