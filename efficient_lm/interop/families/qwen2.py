"""Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

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
from efficient_lm.interop.keys import Config, merged
from efficient_lm.interop.windows import LayerTypes


def window(config: Config) -> int | None:
    """Tokens that a sliding layer sees; windows are off unless `use_sliding_window` turns them on."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None


def layer_type(config: Config, layer: int) -> str:
    """Upper layers slide, where windows are on."""
    slides = window(config) is not None and layer >= config.get("max_window_layers", 28)
    return "sliding_attention" if slides else "full_attention"


def switches(window: int | None, types: list[str]) -> Config:
    """How transformers 4 says the same, as far as it can."""
    first = types.index("sliding_attention") if window else len(types)
    return {"use_sliding_window": window is not None, "max_window_layers": first}


LAYER_TYPES = LayerTypes(32, window, layer_type, switches)

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"mixer": {"bias": True}}),
    keys=(
        *shape(151936, 4096, 32, 32, 22016),
        LAYER_TYPES,
        HEAD_SIZE,
        *common(1e-6),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
)
