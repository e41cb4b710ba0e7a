"""MiniMax-01: lightning attention, softmax attention in some layers, and experts; the stream itself is normed."""

from collections.abc import Iterator

import numpy as np

from efficient_lm.interop.description import InterleavedByHead, Source, Tensor, linear, norm
from efficient_lm.interop.experts import NOISE, SOFTMAX, Balanced
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, RMS, TENSORS, shape
from efficient_lm.interop.families.mixtral import EXPERTS
from efficient_lm.interop.keys import ACTIVATIONS, Config, Draft, Layers, Named, Spread, count, gated, get, key
from efficient_lm.interop.placement import listed
from efficient_lm.interop.rotary import Rotary
from efficient_lm.models.language_model import ModelSpec

KINDS = {"linear_attention": "recurrent", "full_attention": "attend"}
"""Type of a layer → name of our block."""

PREFIXES = {"recurrent": "linear_attn", "attend": "full_attn"}
"""Name of our block → how the factors of its mixer begin."""

MULTIPLIERS = {"alpha": "stream_multiplier", "beta": "residual_multiplier"}
"""How factors end → which of ours they are."""

EXPERT = "block.ffn.expert"

ACTIVATION = {
    theirs: {
        **kinds,
        "recurrent.mixer.activation": ACTIVATIONS[theirs],
        "recurrent.mixer.value_activation": ACTIVATIONS[theirs],
    }
    for theirs, kinds in gated(EXPERT).items()
}
"""Activation of the experts, which is also that of lightning attention's queries, keys and values."""

SIZES = ("attend.mixer.head_size", "recurrent.mixer.key_size", "recurrent.mixer.value_size")


def layer_type(config: Config, layer: int) -> str:
    """Every other layer is linear."""
    return "linear_attention" if layer % 2 else "full_attention"


class Factors:
    """Factors of the stream and of what is added to it, for each kind of mixer and for all channel mixers."""

    def read(self, config: Config, draft: Draft) -> None:
        for end, ours in MULTIPLIERS.items():
            ffn = config.get(f"mlp_{end}_factor", 1)
            for kind, prefix in PREFIXES.items():
                draft.put(f"{kind}.{ours}", {"mixer": config.get(f"{prefix}_{end}_factor", 1), "ffn": ffn})

    def write(self, layers: Layers, config: Config) -> None:
        for end, ours in MULTIPLIERS.items():
            for kind, factor in zip(layers.kinds, layers.each(ours), strict=True):
                mixer, ffn = (get(factor, half) if isinstance(factor, dict) else factor for half in ("mixer", "ffn"))
                config |= {f"{PREFIXES[kind]}_{end}_factor": mixer, f"mlp_{end}_factor": ffn}


def decays(spec: ModelSpec, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """What lightning attention forgets, by step and within a block, which the reference stores and takes from there."""
    size, depth = count(config, "block_size", 256), len(spec.layers())
    step = np.arange(1, size + 1, dtype=np.float32)[:, None]
    between = np.where(step >= step.T, step - step.T, np.inf)
    for layer, block in enumerate(spec.layers()):
        if block.mixer.kind == "lightning":
            slope = 0.5 ** (8 * np.arange(1, block.mixer.heads + 1) / block.mixer.heads)
            slope *= 1 - layer / (depth - 1 + 1e-5) + 1e-5
            rate = slope.astype(np.float32)[:, None, None]
            prefix = f"model.layers.{layer}.self_attn"
            yield f"{prefix}.slope_rate", rate
            yield f"{prefix}.query_decay", np.exp(-rate * step)
            yield f"{prefix}.key_decay", np.exp(-rate * (size - step))
            yield f"{prefix}.diagonal_decay", np.exp(-rate * between)[None]


NORMS: tuple[Tensor, ...] = (
    *norm("input_layernorm", "mixer.stream_norm"),
    *norm("post_attention_layernorm", "ffn.stream_norm"),
)
MAPS = (
    Source("mixer.inner.query_key.weight", 0),
    Source("mixer.inner.query_key.weight", 1),
    Source("mixer.inner.value.weight"),
)

FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    model={"final_norm": RMS},
    block={"norm": RMS, "norm_position": "stream", "ffn": {"kind": "moe", "router": SOFTMAX}},
    kinds={
        "recurrent": {
            "mixer": {
                "kind": "lightning", "gate_activation": "sigmoid", "decay": "geometric", "position": {"kind": "none"},
                "norm": {"kind": "rmsnorm", "epsilon": 1e-6},
            }
        },
        "attend": {"mixer": {"kind": "attention"}},
    },
    keys=(
        *shape(32000, 4096, 32, 8, 14336, "attend", [EXPERT]),
        key("num_attention_heads", "recurrent.mixer.heads", default=32),
        listed("layer_types", KINDS, layer_type, 32),
        key("num_local_experts", "block.ffn.experts", default=8, others=("num_experts",)),
        key("num_experts_per_tok", "block.ffn.top_k", default=2),
        Balanced(0.001),
        key("head_dim", *SIZES, default=None),
        key("sliding_window", "attend.mixer.window", default=None),
        Named("hidden_act", ACTIVATION, "silu"),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-5),
        Factors(),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(theta=1_000_000.0, scope="attend"),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recurrent": (
            Tensor("self_attn.qkv_proj.weight", MAPS, "torch", InterleavedByHead()),
            *linear("self_attn.output_gate", "mixer.inner.gate"),
            *linear("self_attn.out_proj", "mixer.inner.output"),
            *norm("self_attn.norm", "mixer.inner.norm"),
            *EXPERTS,
            *NORMS,
        ),
        "attend": (*ATTENTION, *EXPERTS, *NORMS),
    },
    ignored=(
        r"rotary_emb\.inv_freq$",
        r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",
    ),
    constants=decays,
    dropouts=("attention_dropout", *NOISE),
)  # fmt: skip
