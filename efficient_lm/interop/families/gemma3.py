"""Gemma 3's text model (Gemma team 2025): normed queries and keys, and a slower rotation in layers that see all."""

from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.gemma2 import BLOCK, MODEL, NORMS, RMS, keys, window
from efficient_lm.interop.families.llama import ATTENTION, GATED_MLP, QK_NORM, TENSORS
from efficient_lm.interop.keys import Config, Draft, Layers, Only, merged, put
from efficient_lm.interop.rotary import position, published, scaling
from efficient_lm.interop.windows import KINDS, LayerTypes, by_type

THETA = {"full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0)}
"""Type of layer → where transformers 4 keeps its base, and the default base."""


class RotaryByType:
    """Full and sliding layers turn at their own speeds; only full layers are scaled by `rope_scaling`."""

    def read(self, config: Config, draft: Draft) -> None:
        stated = config.get("rope_parameters") or {}
        for kind, (name, theta) in THETA.items():
            parameters = {"rope_theta": config.get(name, theta), **(stated.get(kind) or {})}
            if kind == "full_attention":
                parameters |= config.get("rope_scaling") or {}
            # The reference looks for it beside the layer types, where it cannot be: YaRN's range is always truncated.
            parameters.pop("truncate", None)
            put(draft.kinds[KINDS[kind]], "mixer.position", position(parameters, config, partial=False))

    def write(self, layers: Layers, config: Config) -> None:
        config |= {"rope_parameters": {}, "rope_scaling": None}
        for kind, spec in by_type(layers, "mixer.position").items():
            parameters = published(spec)
            parameters.pop("partial_rotary_factor")
            config["rope_parameters"][kind] = parameters
            config[THETA[kind][0]] = parameters["rope_theta"]
            if kind == "full_attention":
                config["rope_scaling"] = scaling(parameters)


def layer_type(config: Config, layer: int) -> str:
    """Every sixth layer sees everything, unless the older key says otherwise."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return "sliding_attention" if (layer + 1) % pattern else "full_attention"


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model=MODEL,
    block=merged(BLOCK, {"mixer": {"qk_norm": RMS}}),
    keys=(
        # The reference reads a cap of the attention logits and does not apply it: refused rather than guessed.
        *keys(Only("attn_logit_softcapping", (None,)), None, "block.mixer.qk_norm.epsilon"),
        LayerTypes(26, window, layer_type),
        RotaryByType(),
    ),
    tensors=TENSORS,
    layer_tensors=(*ATTENTION, *QK_NORM, *GATED_MLP, *NORMS),
)
