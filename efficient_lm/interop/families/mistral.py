"""Mistral 7B (Jiang et al. 2023): Llama without biases, every layer with a sliding window."""

from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, BLOCK, GATED_MLP, MODEL, PRE_NORMS, TENSORS, shape
from efficient_lm.interop.keys import GATED, Depth, Named, Only, Spread, key
from efficient_lm.interop.rotary import Rotary

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=MODEL,
    block=BLOCK,
    keys=(
        *shape(32000, 4096, 32, 8, 14336),
        Depth("num_hidden_layers", 32),
        key("head_dim", "block.mixer.head_size", default=None),
        key("sliding_window", "block.mixer.window", default=4096),
        Only("layer_types", (None,)),
        Named("hidden_act", GATED, "silu"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
)
