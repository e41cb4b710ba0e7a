"""Jamba (Lieber et al. 2024) without experts: Mamba with norms of Δ, B and C, and attention once in a period."""

from efficient_lm.interop.description import Tensor, norm
from efficient_lm.interop.families.bamba import FEED_FORWARD, TENSORS, activated
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import MODEL, RMS, attention, shape
from efficient_lm.interop.families.mamba import rank, selective, whole
from efficient_lm.interop.keys import Config, Dense, Inexpressible, Pattern, Spread, count, key

INNER_NORMS: tuple[Tensor, ...] = (
    *norm("mamba.dt_layernorm", "mixer.inner.dt_norm"),
    *norm("mamba.b_layernorm", "mixer.inner.input_norm"),
    *norm("mamba.c_layernorm", "mixer.inner.output_norm"),
)


def _names(config: Config) -> list[str]:
    period, offset = count(config, "attn_layer_period", 8), config.get("attn_layer_offset", 4)
    layers = count(config, "num_hidden_layers", 32)
    return ["attend" if index % period == offset else "recur" for index in range(layers)]


def _keys(names: list[str]) -> Config:
    """The period and the offset at which attention comes; beyond the last layer where there is none."""
    depth = len(names)
    places = [index for index, name in enumerate(names) if name == "attend"] or [depth]
    period = places[1] - places[0] if len(places) > 1 else max(depth, places[0]) + 1
    config = {"num_hidden_layers": depth, "attn_layer_period": period, "attn_layer_offset": places[0]}
    if places[0] >= period or _names(config) != names:
        raise Inexpressible("layout", names)
    return config


def _experts(config: Config) -> str | None:
    number, period = config.get("num_experts", 16), count(config, "expert_layer_period", 2)
    offset, layers = config.get("expert_layer_offset", 1), count(config, "num_hidden_layers", 32)
    placed = any(index % period == offset for index in range(layers))
    return f"num_experts: {number}" if number > 1 and placed else None


FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={
        "recur": {"mixer": {"kind": "mamba", "inner_norm": RMS}},
        "attend": {"mixer": {"kind": "attention", "position": {"kind": "none"}}},
    },
    keys=(
        Dense(_experts, lambda layers: {"num_experts": 1}),
        Pattern(_names, _keys),
        *shape(65536, 4096, 32, 8, 14336, scope="attend"),
        key("head_dim", "attend.mixer.head_size", default=None),
        key("mamba_expand", "recur.mixer.expand", default=2.0, back=whole),
        key("mamba_d_state", "recur.mixer.state_size", default=16),
        rank("mamba_dt_rank", "recur.mixer.rank"),
        key("mamba_d_conv", "recur.mixer.convolution", default=4),
        key("mamba_conv_bias", "recur.mixer.convolution_bias", default=True),
        key("mamba_proj_bias", "recur.mixer.bias", "recur.mixer.output_bias", default=False),
        activated("recur"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", "recur.mixer.inner_norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "tied", default=False),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recur": (*FEED_FORWARD, *selective("mamba"), *INNER_NORMS),
        "attend": (*FEED_FORWARD, *attention()),
    },
)
