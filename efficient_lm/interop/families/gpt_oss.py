"""gpt-oss (OpenAI 2025): attention with sinks, every other layer through a window, and clamped experts."""

from efficient_lm.interop.description import Interleaved, Source, Tensor, table
from efficient_lm.interop.experts import SOFTMAX, Balanced, router
from efficient_lm.interop.families.base import Family
from efficient_lm.interop.families.llama import ATTENTION, BLOCK, MODEL, PRE_NORMS, TENSORS, shape
from efficient_lm.interop.keys import Always, Config, Spread, key, merged
from efficient_lm.interop.rotary import Rotary
from efficient_lm.interop.windows import LayerTypes

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def layer_type(config: Config, layer: int) -> str:
    """Every other layer slides, the first among them."""
    return "full_attention" if layer % 2 else "sliding_attention"


def experts(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """The maps of all experts in one tensor: gates and values in turn where there are both."""
    paths = [f"ffn.inner.experts.{ours}.{part}" for part in ("weight", "bias")]
    if ours == "down":
        return (*table(theirs, paths[0]), *table(f"{theirs}_bias", paths[1]))
    weights, biases = ((Source(path, 0), Source(path, 1)) for path in paths)
    return (
        Tensor(theirs, weights, "same", Interleaved()),
        Tensor(f"{theirs}_bias", biases, "same", Interleaved()),
    )


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    model=MODEL,
    block=merged(
        BLOCK,
        {
            "mixer": {"sink_logit": True},
            "ffn": {"kind": "moe", "expert": {"bias": True}, "router": {**SOFTMAX, "bias": True}},
        },
    ),
    keys=(
        *shape(201088, 2880, 64, 8, 2880, ffns=["block.ffn.expert"]),
        LayerTypes(36, lambda config: config.get("sliding_window", 128), layer_type),
        key("head_dim", "block.mixer.head_size", default=64),
        key("attention_bias", "block.mixer.bias", "block.mixer.output_bias", default=True),
        key("num_local_experts", "block.ffn.experts", default=128, others=("num_experts",)),
        key("num_experts_per_tok", "block.ffn.top_k", default=4),
        Always({"block.ffn.expert.kind": "clamped_swiglu"}),
        key("swiglu_alpha", "block.ffn.expert.slope", default=1.702),
        key("swiglu_limit", "block.ffn.expert.limit", default=7.0),
        Balanced(0.001),
        key("rms_norm_eps", "final_norm.epsilon", "block.norm.epsilon", default=1e-5),
        key("tie_word_embeddings", "tied", default=False),
        Rotary(theta=150_000.0, stated=YARN),
        Spread(),
    ),
    tensors=TENSORS,
    layer_tensors=(
        *ATTENTION,
        *table("self_attn.sinks", "mixer.inner.sinks"),
        *router("mlp.router"),
        *experts("mlp.experts.gate_up_proj", "gate_up"),
        *experts("mlp.experts.down_proj", "down"),
        *PRE_NORMS,
    ),
)
