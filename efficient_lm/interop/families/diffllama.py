"""DiffLlama: Llama with differential attention (Ye et al. 2024)."""

from efficient_lm.interop.description import Source, Tensor
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import (
    ATTENTION,
    BIASES,
    GATED_MLP,
    HEAD_SIZE,
    MODEL,
    PRE_NORMS,
    RMS,
    TENSORS,
    common,
    shape,
)
from efficient_lm.interop.keys import key
from efficient_lm.interop.placement import Depth

LAMBDAS = tuple(
    Tensor(f"self_attn.lambda_{letter}{index + 1}", (Source(f"mixer.inner.lambda_{name}", index),), "vector")
    for letter, name in (("q", "query"), ("k", "key"))
    for index in range(2)
)

FAMILY = Family(
    model_type="diffllama",
    architecture="DiffLlamaForCausalLM",
    model=MODEL,
    block={
        "mixer": {"kind": "differential_attention", "head_norm": {"kind": "rmsnorm", "scale": False}},
        "norm": RMS,
    },
    keys=(
        *shape(32000, 2048, 32, None, 8192),
        Depth("num_hidden_layers", 16),
        HEAD_SIZE,
        BIASES,
        key("lambda_std_dev", "block.mixer.lambda_std", default=0.1),
        *common(1e-5, "block.mixer.head_norm.epsilon"),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *LAMBDAS, *GATED_MLP, *PRE_NORMS),
)
