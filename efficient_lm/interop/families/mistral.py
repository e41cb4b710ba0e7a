"""Mistral 7B (Jiang et al. 2023): Llama without biases, every layer with a sliding window."""

from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BLOCK,
    GATED_MLP,
    HEAD_SIZE,
    MODEL,
    PRE_NORMS,
    TENSORS,
    common,
    shape,
)
from efficient_lm.interop.keys import Only, key
from efficient_lm.interop.placement import Depth

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=MODEL,
    block=BLOCK,
    keys=(
        *shape(32000, 4096, 32, 8, 14336),
        Depth("num_hidden_layers", 32),
        HEAD_SIZE,
        key("sliding_window", "block.mixer.window", default=4096),
        Only("layer_types", (None,)),
        *common(1e-6),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
)
