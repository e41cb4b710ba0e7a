"""Gemma 2 (Gemma team 2024): norms around each half, soft caps, windows in every other layer."""

from efficient_lm.interop.description import norm
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, GATED_MLP, TENSORS, shape
from efficient_lm.interop.keys import GATED, Binding, Config, Named, Only, Spread, key
from efficient_lm.interop.rotary import Rotary
from efficient_lm.interop.windows import LayerTypes

RMS = {"kind": "rmsnorm", "one_plus": True}
MODEL = {"final_norm": RMS, "embedding_multiplier": "sqrt_width"}
BLOCK = {"mixer": {"kind": "attention"}, "norm": RMS, "norm_position": "sandwich"}
NORMS = (
    *norm("input_layernorm", "mixer.input_norm"),
    *norm("post_attention_layernorm", "mixer.output_norm"),
    *norm("pre_feedforward_layernorm", "ffn.input_norm"),
    *norm("post_feedforward_layernorm", "ffn.output_norm"),
)


def window(config: Config) -> int | None:
    """Tokens that a sliding layer sees."""
    return config.get("sliding_window", 4096)


def size_from_scale(scale: float | None) -> float | None:
    """The size whose inverse root is a factor of the logits; whole where it is one."""
    if scale is None:
        return None
    size = scale**-2
    return round(size) if round(size) ** -0.5 == scale else size


def keys(softcap: Binding, logit_softcap: float | None, *paths: str) -> tuple[Binding, ...]:
    """What Gemma 2 and 3 name alike; `paths` are norms besides those of the blocks."""
    return (
        *shape(256000, 2304, 8, 4, 9216),
        key("head_dim", "block.mixer.head_size", default=256),
        key(
            "query_pre_attn_scalar", "block.mixer.scale", default=256,
            to=lambda size: size and size**-0.5, back=size_from_scale,
        ),
        Named("hidden_activation", GATED, "gelu_pytorch_tanh"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", *paths, default=1e-6),
        key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=False),
        softcap,
        key("final_logit_softcapping", "logit_softcap", default=logit_softcap),
        key("tie_word_embeddings", "tied", default=True),
        Only("use_bidirectional_attention", (False, None), False),
        Spread(),
    )  # fmt: skip


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    model=MODEL,
    block=BLOCK,
    keys=(
        *keys(key("attn_logit_softcapping", "block.mixer.softcap", default=50.0), 30.0),
        LayerTypes(26, window, lambda config, layer: "full_attention" if layer % 2 else "sliding_attention"),
        Rotary(),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *GATED_MLP, *NORMS),
)
