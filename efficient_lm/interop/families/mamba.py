"""Mamba (Gu & Dao 2023): one selective state space model per layer, and no channel mixer."""

from efficient_lm.interop.description import Rows, Source, Tensor, fused, linear, norm, table
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.keys import ACTIVATIONS, Binding, Inexpressible, Named, Spread, key
from efficient_lm.interop.placement import Depth

RMS = {"kind": "rmsnorm"}
MODEL = {"final_norm": RMS}

TENSORS: tuple[Tensor, ...] = (
    *table("backbone.embeddings.weight", "embedding.tokens", aliases=["backbone.embedding.weight"]),
    *norm("backbone.norm_f", "head.norm"),
    *table("lm_head.weight", "head.weight", "torch"),
)


def convolution(theirs: str, *ours: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a depthwise convolution over the channels of one or several of ours."""
    weights, biases = (tuple(Source(f"{path}.{part}") for path in ours) for part in ("weight", "bias"))
    return (
        Tensor(f"{theirs}.conv1d.weight", weights, "depthwise", Rows()),
        Tensor(f"{theirs}.conv1d.bias", biases, "vector", Rows()),
    )


def selective(theirs: str) -> tuple[Tensor, ...]:
    """The tensors of a selective state space model whose names begin with `theirs`."""
    ours = "mixer.inner"
    return (
        *linear(f"{theirs}.in_proj", f"{ours}.input_gate"),
        *convolution(theirs, f"{ours}.convolution"),
        fused(f"{theirs}.x_proj", [(f"{ours}.dt_down", None), (f"{ours}.input_output", None)], "torch", Rows())[0],
        *table(f"{theirs}.dt_proj.weight", f"{ours}.dt_up", "torch"),
        *table(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias"),
        *table(f"{theirs}.A_log", f"{ours}.A_log"),
        *table(f"{theirs}.D", f"{ours}.D"),
        *linear(f"{theirs}.out_proj", f"{ours}.output"),
    )


def convolved(name: str, *paths: str) -> Named:
    """The key of the activation after the convolution; the gate's is always SiLU."""
    return Named(name, {theirs: dict.fromkeys(paths, ours) for theirs, ours in ACTIVATIONS.items()}, "silu")


def whole(factor: float) -> int:
    """A factor of the width as published configs have it. Raises `Inexpressible` for one that is not whole."""
    if not float(factor).is_integer():
        raise Inexpressible("block.mixer.expand", factor)
    return int(factor)


def rank(name: str, path: str) -> Binding:
    """The key of the rank of the map to Δ."""
    return key(name, path, default="auto", to=lambda value: None if value == "auto" else value)


def keys() -> tuple[Binding, ...]:
    """What Mamba and FalconMamba name alike."""
    return (
        key("vocab_size", "vocab_size", default=50280),
        key("hidden_size", "width", default=768),
        Depth("num_hidden_layers", 32),
        key("expand", "block.mixer.expand", default=2.0, back=whole),
        key("state_size", "block.mixer.state_size", default=16),
        rank("time_step_rank", "block.mixer.rank"),
        key("conv_kernel", "block.mixer.convolution", default=4),
        key("use_conv_bias", "block.mixer.convolution_bias", default=True),
        key("use_bias", "block.mixer.bias", "block.mixer.output_bias", default=False),
        convolved("hidden_act", "block.mixer.activation"),
        key("layer_norm_epsilon", "final_norm.epsilon", "block.norm.epsilon", default=1e-5),
        key("tie_word_embeddings", "tied", default=True),
        Spread(default=0.1),
    )


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    model=MODEL,
    block={"ffn": None, "norm": RMS},
    kinds={"layer": {"mixer": {"kind": "mamba"}}},
    keys=keys(),
    tensors=TENSORS,
    layer_tensors=(*norm("norm", "mixer.input_norm"), *selective("mixer")),
    layer="backbone.layers.{}.",
    prefix="backbone.",
    dropouts=(),
    ignored=(),
)
