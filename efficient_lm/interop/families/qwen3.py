"""Qwen 3 (Yang et al. 2025): a norm on each head's queries and keys, biases optional."""

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
from efficient_lm.interop.families.qwen2 import LAYER_TYPES
from efficient_lm.interop.keys import key, merged

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"mixer": {"qk_norm": RMS}}),
    keys=(
        *shape(151936, 4096, 32, 32, 22016),
        LAYER_TYPES,
        key("head_dim", "block.mixer.head_size", default=128),
        BIASES,
        *common(1e-6, "block.mixer.qk_norm.epsilon"),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *QK_NORM, *GATED_MLP, *PRE_NORMS),
)
