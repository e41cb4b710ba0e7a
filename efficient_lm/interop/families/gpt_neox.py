"""GPT-NeoX and Pythia (Black et al. 2022): both halves in parallel, a part of each head turned."""

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import InterleavedByHead, fused, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.keys import PLAIN, Config, Draft, Inexpressible, Layers, Named, Spread, count, key
from efficient_lm.interop.placement import Depth
from efficient_lm.interop.rotary import Rotary

LAYER_NORM = {"kind": "layernorm"}


class HeadSize:
    """`head_dim`: where it is stated, it must be what width and heads make it, for the rotation alone would read it."""

    def read(self, config: Config, draft: Draft) -> None:
        size = count(config, "hidden_size", 6144) // count(config, "num_attention_heads", 64)
        if config.get("head_dim") not in (None, size):
            raise ConfigError(f"head_dim: {config['head_dim']} is not supported; hidden_size / heads = {size} is")

    def write(self, layers: Layers, config: Config) -> None:
        size = layers.get("block.mixer.head_size")
        if size * layers.get("block.mixer.heads") != layers.spec.width:
            raise Inexpressible("block.mixer.head_size", size)


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model={"final_norm": LAYER_NORM},
    block={"mixer": {"kind": "attention"}, "ffn": {"kind": "mlp", "bias": True}, "norm": LAYER_NORM},
    keys=(
        key("vocab_size", "vocab_size", default=50432),
        key("hidden_size", "width", default=6144),
        Depth("num_hidden_layers", 44),
        key("num_attention_heads", "block.mixer.heads", default=64),
        HeadSize(),
        key("intermediate_size", "block.ffn.hidden", default=24576),
        Named("hidden_act", PLAIN, "gelu"),
        key("layer_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-5),
        key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=True),
        key(
            "use_parallel_residual", "block.residual", default=True,
            to=lambda parallel: "parallel" if parallel else "sequential", back=lambda residual: residual == "parallel",
        ),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
        Spread(),
    ),
    tensors=(
        *table("gpt_neox.embed_in.weight", "embedding.tokens"),
        *norm("gpt_neox.final_layer_norm", "head.norm"),
        *table("embed_out.weight", "head.weight", "torch", aliases=["lm_head.weight"]),
    ),
    layer_tensors=(
        *norm("input_layernorm", "mixer.input_norm"),
        *norm("post_attention_layernorm", "ffn.input_norm"),
        *fused(
            "attention.query_key_value",
            [("mixer.inner.query", None), ("mixer.inner.key_value", 0), ("mixer.inner.key_value", 1)],
            "torch",
            InterleavedByHead(),
        ),
        *linear("attention.dense", "mixer.inner.output"),
        *linear("mlp.dense_h_to_4h", "ffn.inner.up"),
        *linear("mlp.dense_4h_to_h", "ffn.inner.down"),
    ),
    layer="gpt_neox.layers.{}.",
    prefix="gpt_neox.",
    dropouts=("attention_dropout", "hidden_dropout"),
    ignored=(r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$"),
)  # fmt: skip
