"""Nemotron-H (NVIDIA 2025): Mamba-2, attention, MLP and experts, each a layer by itself, in any order."""

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.interop.description import Tensor, each, linear, norm
from efficient_lm.interop.experts import CORRECTED, SIGMOID, Shared, grouped, router
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import MODEL, RMS, attention
from efficient_lm.interop.families.mamba import TENSORS, convolved
from efficient_lm.interop.families.mamba2 import duality
from efficient_lm.interop.keys import ACTIVATIONS, Always, Config, Inexpressible, Named, Spread, key, listing
from efficient_lm.interop.placement import Pattern

KINDS = {"linear_attention": "recur", "mamba": "recur", "full_attention": "attend", "attention": "attend"}
KINDS |= {"mlp": "feed", "moe": "route"}
"""Type of a layer → name of our block; transformers before 5 has the shorter names."""

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Letter of `hybrid_override_pattern` → type of a layer."""

LISTS = ("layer_types", "layers_block_type")
"""Keys that list the types of the layers; the first prevails, and both prevail over the letters."""


def _names(config: Config) -> list[str]:
    name = next((name for name in LISTS if config.get(name) is not None), "hybrid_override_pattern")
    letters = str(config.get("hybrid_override_pattern") or "ME*-")
    types = listing(config, name) if name in LISTS else [LETTERS.get(letter, letter) for letter in letters]
    if not types:
        raise ConfigError(f"{name}: lists no layers")
    for kind in types:
        if kind not in KINDS:
            raise ConfigError(f"{name}: '{kind}' is not supported; {nearest(str(kind), KINDS)}")
    return [KINDS[kind] for kind in types]


def _keys(names: list[str]) -> Config:
    theirs = {ours: published for published, ours in reversed(KINDS.items())}
    letters = {KINDS[published]: letter for letter, published in LETTERS.items()}
    types, pattern = [theirs[name] for name in names], "".join(letters[name] for name in names)
    return {**dict.fromkeys(LISTS, types), "hybrid_override_pattern": pattern, "num_hidden_layers": len(types)}


ACTIVATION = {
    theirs: {"feed.ffn.activation": ours, "route.ffn.expert.activation": ours} for theirs, ours in ACTIVATIONS.items()
}


def mlp(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """A plain channel mixer."""
    return (*linear(f"{theirs}.up_proj", f"{ours}.up"), *linear(f"{theirs}.down_proj", f"{ours}.down"))


def _least(limit: list[float | None]) -> float:
    if limit[1] is not None:
        raise Inexpressible("recur.mixer.dt_limit", limit)
    return limit[0]


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    model=MODEL,
    block={"norm": RMS},
    kinds={
        "recur": {"mixer": {"kind": "mamba2"}, "ffn": None},
        "attend": {"mixer": {"kind": "attention", "position": {"kind": "none"}}, "ffn": None},
        "feed": {"mixer": None, "ffn": {"kind": "mlp"}},
        "route": {"mixer": None, "ffn": {"kind": "moe"}},
    },
    keys=(
        Pattern(_names, _keys),
        key("vocab_size", "vocab_size", default=131072),
        key("hidden_size", "width", default=4096),
        key("num_attention_heads", "attend.mixer.heads", default=32),
        key("num_key_value_heads", "attend.mixer.kv_heads", default=8),
        key("head_dim", "attend.mixer.head_size", default=128),
        key("intermediate_size", "feed.ffn.hidden", default=21504),
        Named("mlp_hidden_act", ACTIVATION, "relu2"),
        Always({"route.ffn.router": SIGMOID, "route.ffn.balance": CORRECTED, "route.ffn.expert.kind": "mlp"}),
        key("n_routed_experts", "route.ffn.experts", default=8, others=("num_local_experts",)),
        key("num_experts_per_tok", "route.ffn.top_k", default=2),
        key("moe_intermediate_size", "route.ffn.expert.hidden", default=7688),
        key("moe_latent_size", "route.ffn.latent", default=None),
        *grouped("route", (1, 1), 1.0),
        Shared("moe_shared_expert_intermediate_size", 7688, "route", instead=("intermediate_size", 21504)),
        key("mlp_bias", "feed.ffn.bias", "route.ffn.shared.bias", "route.ffn.latent_bias", default=False),
        key("mamba_num_heads", "recur.mixer.heads", default=128),
        key("mamba_head_dim", "recur.mixer.head_size", default=64),
        key("n_groups", "recur.mixer.groups", default=8, others=("mamba_n_groups",)),
        key("ssm_state_size", "recur.mixer.state_size", default=128),
        key("conv_kernel", "recur.mixer.convolution", default=4, others=("mamba_d_conv",)),
        key("use_conv_bias", "recur.mixer.convolution_bias", default=True, others=("mamba_conv_bias",)),
        key("use_bias", "recur.mixer.bias", "recur.mixer.output_bias", default=False),
        convolved("mamba_hidden_act", "recur.mixer.activation"),
        # The reference takes its least step from here, and none of `time_step_limit`.
        key(
            "time_step_min", "recur.mixer.dt_limit", default=0.001, others=("mamba_dt_min",),
            to=lambda least: [least, None], back=_least,
        ),
        key("layer_norm_epsilon", "final_norm.epsilon", "block.norm.epsilon", "recur.mixer.norm_epsilon", default=1e-5),
        # The reference has no weights to tie, whatever this says.
        key("tie_word_embeddings", "tied", default=False, to=lambda tied: False),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors={
        "recur": (*norm("norm", "mixer.input_norm"), *duality("mixer")),
        "attend": (*norm("norm", "mixer.input_norm"), *attention("mixer")),
        "feed": (*norm("norm", "ffn.input_norm"), *mlp("mixer", "ffn.inner")),
        "route": (
            *norm("norm", "ffn.input_norm"),
            *router("mixer.gate"),
            *each(*mlp("mixer.experts.{}", "ffn.inner.experts")),
            *mlp("mixer.shared_experts", "ffn.inner.shared"),
            *linear("mixer.fc1_latent_proj", "ffn.inner.latent_down"),
            *linear("mixer.fc2_latent_proj", "ffn.inner.latent_up"),
        ),
    },
    layer="backbone.layers.{}.",
    prefix="backbone.",
    dropouts=("attention_dropout", "hidden_dropout"),
    ignored=(r"^mtp\.",),
)  # fmt: skip
