"""OLMo 2 (OLMo team 2024): norms after each half, queries and keys normed over all heads together."""

from efficient_lm.interop.description import norm
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BIASES,
    BLOCK,
    GATED_MLP,
    HEAD_SIZE,
    MODEL,
    QK_NORM,
    RMS,
    TENSORS,
    common,
    shape,
)
from efficient_lm.interop.keys import merged
from efficient_lm.interop.placement import Depth

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"norm_position": "output", "mixer": {"qk_norm": RMS, "qk_norm_over": "all"}}),
    keys=(
        *shape(50304, 4096, 32, None, 11008),
        Depth("num_hidden_layers", 32),
        HEAD_SIZE,
        BIASES,
        *common(1e-5, "block.mixer.qk_norm.epsilon"),
    ),
    tensors=TENSORS,
    layer_tensors=(
        *ATTENTION,
        *QK_NORM,
        *GATED_MLP,
        *norm("post_attention_layernorm", "mixer.output_norm"),
        *norm("post_feedforward_layernorm", "ffn.output_norm"),
    ),
)
