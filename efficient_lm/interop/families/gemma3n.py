"""Gemma 3n's text model (Gemma team 2025): layers of widths of their own, several streams, embeddings by layer."""

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import each, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.gemma2 import NORMS
from efficient_lm.interop.families.gemma3 import RotaryByType
from efficient_lm.interop.families.llama import ATTENTION, BIASES, GATED_MLP, MODEL, QK_NORM, RMS, TENSORS
from efficient_lm.interop.keys import (
    ACTIVATIONS,
    GATED,
    ByLayer,
    Config,
    Draft,
    Inexpressible,
    Layers,
    Named,
    Spread,
    count,
    key,
    merged,
)
from efficient_lm.interop.windows import LayerTypes

ACTIVATION = {
    theirs: {**values, "block.layer_input.activation": ACTIVATIONS[theirs]} for theirs, values in GATED.items()
}
"""Activation of channel mixers and layer inputs → ours."""

EPSILONS = ("final_norm", "block.norm", "block.mixer.qk_norm", "block.streams.norm", "layer_embedding.norm")


class SharedKeys:
    """The last layers take the keys and values of the last layer of their type before them."""

    name = "num_kv_shared_layers"

    def read(self, config: Config, draft: Draft) -> None:
        layers, taking = len(draft.layout), count(config, self.name, 15, least=0)
        if taking >= layers:
            raise ConfigError(f"{self.name}: {taking} of {layers} layers, and the first has none before it")
        epsilon = config.get("rms_norm_eps", 1e-6)
        for kind in list(draft.kinds):
            own = {"mixer": {"value_norm": {**RMS, "scale": False, "epsilon": epsilon}}}
            draft.kinds[f"{kind}_shared"] = merged(draft.kinds[kind], {"mixer": {"shares_keys": True}})
            draft.kinds[kind] = merged(draft.kinds[kind], own)
        draft.layout = [
            f"{kind}_shared" if layer >= layers - taking else kind for layer, kind in enumerate(draft.layout)
        ]

    def write(self, layers: Layers, config: Config) -> None:
        taking = layers.each("mixer.shares_keys")
        if sorted(taking) != taking:
            raise Inexpressible("block.mixer.shares_keys", taking)
        config[self.name] = sum(taking)


def layer_type(config: Config, layer: int) -> str:
    """Every fifth layer sees everything."""
    return "sliding_attention" if (layer + 1) % 5 else "full_attention"


FAMILY = Family(
    model_type="gemma3n_text",
    architecture="Gemma3nForCausalLM",
    model={**MODEL, "embedding_multiplier": "sqrt_width", "layer_embedding": {"norm": RMS}},
    block={
        "mixer": {"kind": "attention", "qk_norm": RMS, "scale": 1.0},
        "norm": RMS,
        "norm_position": "sandwich",
        "laurel": {"form": "averaged"},
        "streams": {"kind": "altup", "norm": RMS},
    },
    keys=(
        key("vocab_size", "vocab_size", default=262400),
        key("hidden_size", "width", default=2048),
        key("num_attention_heads", "block.mixer.heads", default=8),
        key("num_key_value_heads", "block.mixer.kv_heads", default=2),
        key("head_dim", "block.mixer.head_size", default=256),
        Named("hidden_activation", ACTIVATION, "gelu_pytorch_tanh"),
        key("rms_norm_eps", *(f"{path}.epsilon" for path in EPSILONS), default=1e-6),
        BIASES,
        key("final_logit_softcapping", "logit_softcap", default=30.0),
        key("tie_word_embeddings", "tied", default=True),
        key("laurel_rank", "block.laurel.rank", default=64),
        key("altup_num_inputs", "block.streams.count", default=4),
        key("altup_active_idx", "block.streams.active", default=0),
        key("altup_coef_clip", "block.streams.coefficient_limit", default=120.0),
        key("altup_correct_scale", "block.layer_input.scaled", default=True),
        key("hidden_size_per_layer_input", "layer_embedding.size", "block.layer_input.size", default=256),
        key("vocab_size_per_layer_input", "layer_embedding.vocab_size", default=262144),
        Spread(),
        LayerTypes(35, lambda config: config.get("sliding_window", 512), layer_type),
        RotaryByType(),
        SharedKeys(),
        ByLayer("intermediate_size", "ffn.hidden", lambda layers: 16384),
        ByLayer(
            "activation_sparsity_pattern", "ffn.sparsity", single=False,
            default=lambda layers: [0.95 if layers > 10 and layer < 10 else 0.0 for layer in range(layers)],
        ),
    ),
    tensors=(
        *TENSORS,
        *table("model.embed_tokens_per_layer.weight", "layer_embedding.tokens", "rows"),
        *linear("model.per_layer_model_projection", "layer_embedding.projection"),
        *norm("model.per_layer_projection_norm", "layer_embedding.norm"),
        *each(*table("model.altup_projections.{}.weight", "streams.entry", "torch")),
        *each(*table("model.altup_unembed_projections.{}.weight", "streams.exit", "torch")),
    ),
    layer_tensors=(
        *ATTENTION,
        *QK_NORM,
        *GATED_MLP,
        *NORMS,
        *linear("laurel.linear_left", "laurel.path.down"),
        *linear("laurel.linear_right", "laurel.path.up"),
        *norm("laurel.post_laurel_norm", "laurel.norm"),
        *linear("altup.prediction_coefs", "streams.prediction"),
        *linear("altup.correction_coefs", "streams.correction"),
        *linear("altup.modality_router", "streams.router"),
        *norm("altup.router_norm", "streams.norm"),
        *table("altup.correct_output_scale", "layer_input.scale"),
        *linear("per_layer_input_gate", "layer_input.gate"),
        *linear("per_layer_projection", "layer_input.projection"),
        *norm("post_per_layer_input_norm", "layer_input.norm"),
    ),
    # Maps of keys and values that a layer takes from another, and factors that the config turns off.
    ignored=(
        r"rotary_emb\.inv_freq$",
        r"self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight$",
        r"altup\.correct_output_scale$",
    ),
)  # fmt: skip
