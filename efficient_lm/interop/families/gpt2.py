"""GPT-2 (Radford et al. 2019): learned positions, one map for queries, keys and values, matrices ``[in, out]``."""

from efficient_lm.interop.description import Concatenated, fused, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.keys import PLAIN, Config, Draft, Inexpressible, Layers, Named, Only, Spread, count, key
from efficient_lm.interop.placement import Depth

LAYER_NORM = {"kind": "layernorm"}


class Scale:
    """The factor of the logits, which `scale_attn_by_inverse_layer_idx` lets fall with depth."""

    def read(self, config: Config, draft: Draft) -> None:
        size = count(config, "n_embd", 768) // count(config, "n_head", 12)
        first = size**-0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx", False):
            layers = count(config, "n_layer", 12)
            draft.put("block.mixer.scale", [first / (index + 1) for index in range(layers)])
        elif first == 1.0:
            draft.put("block.mixer.scale", first)

    def write(self, layers: Layers, config: Config) -> None:
        found = layers.each("mixer.scale")
        plain = layers.get("block.mixer.head_size") ** -0.5
        first = plain if found[0] is None else found[0]
        inverse = len(found) > 1 and found[1] not in (None, first)
        if first not in (plain, 1.0):
            raise Inexpressible("block.mixer.scale", found)
        config |= {"scale_attn_weights": first == plain, "scale_attn_by_inverse_layer_idx": inverse}


class Inner:
    """`n_inner`: four times the width, unless it is given."""

    def read(self, config: Config, draft: Draft) -> None:
        draft.put("block.ffn.hidden", config.get("n_inner") or 4 * count(config, "n_embd", 768))

    def write(self, layers: Layers, config: Config) -> None:
        config["n_inner"] = layers.get("block.ffn.hidden")


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    model={"final_norm": LAYER_NORM},
    block={
        "mixer": {"kind": "attention", "bias": True, "output_bias": True, "position": {"kind": "none"}},
        "ffn": {"kind": "mlp", "bias": True},
        "norm": LAYER_NORM,
    },
    keys=(
        key("vocab_size", "vocab_size", default=50257),
        key("n_embd", "width", default=768),
        Depth("n_layer", 12),
        key("n_head", "block.mixer.heads", default=12),
        key("n_positions", "learned_positions", default=1024),
        Inner(),
        Named("activation_function", PLAIN, "gelu_new"),
        key("layer_norm_epsilon", "final_norm.epsilon", "block.norm.epsilon", default=1e-5),
        key("tie_word_embeddings", "tied", default=True),
        Scale(),
        Only("add_cross_attention", (False,), False),
        Spread(),
    ),
    tensors=(
        *table("transformer.wte.weight", "embedding.tokens"),
        *table("transformer.wpe.weight", "embedding.positions"),
        *norm("transformer.ln_f", "head.norm"),
        *table("lm_head.weight", "head.weight", "torch"),
    ),
    layer_tensors=(
        *norm("ln_1", "mixer.input_norm"),
        *fused(
            "attn.c_attn",
            [("mixer.inner.query", None), ("mixer.inner.key_value", 0), ("mixer.inner.key_value", 1)],
            "conv1d",
            Concatenated(),
        ),
        *fused("attn.c_proj", [("mixer.inner.output", None)], "conv1d"),
        *norm("ln_2", "ffn.input_norm"),
        *fused("mlp.c_fc", [("ffn.inner.up", None)], "conv1d"),
        *fused("mlp.c_proj", [("ffn.inner.down", None)], "conv1d"),
    ),
    layer="transformer.h.{}.",
    prefix="transformer.",
    dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ignored=(r"\.attn\.(masked_)?bias$",),
)
