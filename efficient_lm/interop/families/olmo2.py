"""OLMo 2 (OLMo team 2024): norms after each half, queries and keys normed over all heads together."""

from efficient_lm.interop.description import norm
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, BLOCK, GATED_MLP, MODEL, QK_NORM, RMS, TENSORS, shape
from efficient_lm.interop.keys import GATED, Depth, Named, Spread, key, merged
from efficient_lm.interop.rotary import Rotary

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"norm_position": "output", "mixer": {"qk_norm": RMS, "qk_norm_over": "all"}}),
    keys=(
        *shape(50304, 4096, 32, None, 11008),
        Depth("num_hidden_layers", 32),
        key("head_dim", "block.mixer.head_size", default=None),
        Named("hidden_act", GATED, "silu"),
        key(
            "rms_norm_eps",
            "final_norm.epsilon", "block.norm.epsilon", "block.mixer.qk_norm.epsilon", default=1e-5,
        ),
        key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=False),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=(
        *ATTENTION,
        *QK_NORM,
        *GATED_MLP,
        *norm("post_attention_layernorm", "mixer.output_norm"),
        *norm("post_feedforward_layernorm", "ffn.output_norm"),
    ),
)  # fmt: skip
