"""Architectures of GGUF files as Hugging Face configs and tensor names.

Sources: the metadata and tensor names that llama.cpp's converter writes, and what its readers compute from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import CheckpointError, nearest
from efficient_lm.interop.gguf.header import Header
from efficient_lm.interop.gguf.metadata import Metadata
from efficient_lm.interop.gguf.rotary import ROPE_FREQS, rope_parameters, with_frequencies
from efficient_lm.interop.gguf.tensors import PLAIN, Stored

Config = dict[str, Any]
_GEMMA3_PATTERN = 6
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        config: what the keys give beyond sizes common to all.
        tied: whether the file cannot hold a head of its own.
        sandwich: whether norms also follow each half of a block.
        qk_norm: whether queries and keys are normed.
        qkv_bias: whether queries, keys and values have biases; None where the tensors tell.
        interleaved: whether rows of queries and keys are in the order of interleaved rotary positions.
        norm_shift: that GGUF has added to the weights of norms.
    """

    config: Callable[[Metadata, Header, Config], Config]
    tied: bool = False
    sandwich: bool = False
    qk_norm: bool = False
    qkv_bias: bool | None = None
    interleaved: bool = False
    norm_shift: float = 0.0


def describe(header: Header) -> tuple[Config, dict[str, Stored]]:
    """The config of a file, and where each Hugging Face tensor lies in it.

    Raises:
        CheckpointError: an architecture, key or tensor that is not supported; a key that is missing.
    """
    name = header.metadata.get("general.architecture")
    if name is None:
        raise CheckpointError(f"{header.path}: the key 'general.architecture' is missing")
    if name not in ARCHITECTURES:
        close = nearest(name, ARCHITECTURES)
        raise CheckpointError(f"{header.path}: architecture '{name}' is not supported; {close}")
    architecture, keys = ARCHITECTURES[name], Metadata(header, name)
    config = _sizes(header, keys, architecture)
    config |= architecture.config(keys, header, config)
    keys.finish()
    stored = _stored(architecture, header, config)
    _refuse_others(header, name, stored)
    return config, stored


def _sizes(header: Header, keys: Metadata, architecture: Architecture) -> Config:
    """What all architectures state alike."""
    if keys.get("expert_count", 0):
        raise keys.refused("expert_count", f"is {keys.get('expert_count')}: mixtures of experts are not supported")
    keys.only("attention.causal", (True,))
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    if not keys.has("attention.key_length") and width % heads:
        raise keys.refused("embedding_length", f"is {width}, which {heads} heads do not share evenly")
    head_size = keys.count("attention.key_length", width // heads)
    layers = keys.count("block_count")
    if layers > len(header.tensors):
        raise keys.refused("block_count", f"is {layers}, and the file holds only {len(header.tensors)} tensors")
    if head_size % 2:
        raise keys.refused("attention.key_length", f"is {head_size}; rotary positions need an even one")
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.only(key, (head_size,))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing or not a matrix")
    keys.only("vocab_size", (embedding.shape[0],))
    config = {
        "vocab_size": embedding.shape[0], "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": keys.count("feed_forward_length"), "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads), "head_dim": head_size,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": architecture.tied or "output.weight" not in header.tensors,
        "dtype": _dtype(header),
    }  # fmt: skip
    for ours, theirs in _SPECIAL.items():
        if (token := header.metadata.get(f"tokenizer.ggml.{theirs}")) is not None:
            config[ours] = token
    return config


def _dtype(header: Header) -> str:
    """What the matrices are read as; float32 where they are of several kinds or quantised."""
    kinds = {info.type for info in header.tensors.values() if len(info.shape) > 1}
    kind = kinds.pop() if len(kinds) == 1 else None
    return PLAIN[kind][0] if kind in PLAIN else "float32"


def _llama(keys: Metadata, header: Header, sizes: Config) -> Config:
    """Llama; with a sliding window it is what Hugging Face calls Mistral, which the file does not tell apart."""
    parameters = rope_parameters(keys, keys.number("rope.freq_base", 10000.0))
    config = {"rope_parameters": with_frequencies(header, parameters, sizes["head_dim"]), "hidden_act": "silu"}
    if keys.get("attention.sliding_window", 0):
        window = keys.count("attention.sliding_window")
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window, **config}
    biases = {
        f"{part}_bias": f"blk.0.{tensor}.bias" in header.tensors
        for part, tensor in {"attention": "attn_q", "mlp": "ffn_gate"}.items()
    }
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **biases, **config}


def _qwen(model_type: str, architecture: str) -> Callable[[Metadata, Header, Config], Config]:
    def config(keys: Metadata, header: Header, sizes: Config) -> Config:
        keys.only("attention.sliding_window", (0,))
        return {
            "model_type": model_type, "architectures": [architecture], "hidden_act": "silu",
            "rope_parameters": rope_parameters(keys, keys.number("rope.freq_base", 10000.0)),
            "use_sliding_window": False, "sliding_window": None,
            "layer_types": ["full_attention"] * sizes["num_hidden_layers"],
        }  # fmt: skip

    return config


def _qwen3(keys: Metadata, header: Header, sizes: Config) -> Config:
    biased = "blk.0.attn_q.bias" in header.tensors
    return {**_qwen("qwen3", "Qwen3ForCausalLM")(keys, header, sizes), "attention_bias": biased}


def _gemma(keys: Metadata, sizes: Config, widest: int, period: int) -> Config:
    """What Gemma 2 and 3 have alike.

    Args:
        widest: layers of the one size whose logits are scaled by its width per head, not by the head's size.
        period: of the layers with full attention; the others slide.
    """
    keys.only("attention.sliding_window_pattern", (period,))
    layers = sizes["num_hidden_layers"]
    per_head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "query_pre_attn_scalar": per_head if layers == widest else sizes["head_dim"],
        "layer_types": [
            "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)
        ],
    }  # fmt: skip


def _gemma2(keys: Metadata, header: Header, sizes: Config) -> Config:
    parameters = rope_parameters(keys, keys.number("rope.freq_base", 10000.0))
    keys.only("rope.freq_base_swa", (parameters["rope_theta"],))
    return {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_gemma(keys, sizes, widest=46, period=2),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "rope_parameters": parameters,
    }  # fmt: skip


def _gemma3(keys: Metadata, header: Header, sizes: Config) -> Config:
    final = keys.number("final_logit_softcapping") if keys.has("final_logit_softcapping") else None
    local = keys.number("rope.freq_base_swa", 10000.0)
    return {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        **_gemma(keys, sizes, widest=62, period=_GEMMA3_PATTERN),
        "sliding_window": keys.count("attention.sliding_window"),
        "attn_logit_softcapping": None, "final_logit_softcapping": final,
        "rope_parameters": {
            "full_attention": rope_parameters(keys, keys.number("rope.freq_base", 1000000.0)),
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
    }  # fmt: skip


ARCHITECTURES = {
    "llama": Architecture(_llama, interleaved=True),
    "qwen2": Architecture(_qwen("qwen2", "Qwen2ForCausalLM"), qkv_bias=True),
    "qwen3": Architecture(_qwen3, qk_norm=True),
    "gemma2": Architecture(_gemma2, tied=True, sandwich=True, qkv_bias=False, norm_shift=1.0),
    "gemma3": Architecture(_gemma3, sandwich=True, qk_norm=True, qkv_bias=False, norm_shift=1.0),
}


def _stored(architecture: Architecture, header: Header, config: Config) -> dict[str, Stored]:
    """Every Hugging Face tensor of the model."""
    vocab, width, shift = config["vocab_size"], config["hidden_size"], architecture.norm_shift
    stored = {
        "model.embed_tokens.weight": Stored("token_embd.weight", (vocab, width)),
        "model.norm.weight": Stored("output_norm.weight", (width,), shift=shift),
    }
    if not config["tie_word_embeddings"]:
        stored["lm_head.weight"] = Stored("output.weight", (vocab, width))
    layer = {**_maps(architecture, config), **_norms(architecture, config)}
    for index in range(config["num_hidden_layers"]):
        for name, entry in layer.items():
            stored[f"model.layers.{index}.{name}"] = Stored(
                f"blk.{index}.{entry.name}", entry.shape, entry.interleaved_heads, entry.shift
            )
    return stored


def _maps(architecture: Architecture, config: Config) -> dict[str, Stored]:
    """Linear maps of a layer, with the biases that the config says there are."""
    width, hidden, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    biased = config.get("attention_bias", False)
    qkv_biased = biased if architecture.qkv_bias is None else architecture.qkv_bias
    order = (heads, kv_heads) if architecture.interleaved else (0, 0)
    maps = [
        ("self_attn.q_proj", "attn_q", heads * size, width, qkv_biased, order[0]),
        ("self_attn.k_proj", "attn_k", kv_heads * size, width, qkv_biased, order[1]),
        ("self_attn.v_proj", "attn_v", kv_heads * size, width, qkv_biased, 0),
        ("self_attn.o_proj", "attn_output", width, heads * size, biased, 0),
        ("mlp.gate_proj", "ffn_gate", hidden, width, config.get("mlp_bias", False), 0),
        ("mlp.up_proj", "ffn_up", hidden, width, config.get("mlp_bias", False), 0),
        ("mlp.down_proj", "ffn_down", width, hidden, config.get("mlp_bias", False), 0),
    ]
    stored = {}
    for theirs, ours, outputs, inputs, bias, interleaved in maps:
        stored[f"{theirs}.weight"] = Stored(f"{ours}.weight", (outputs, inputs), interleaved)
        if bias:
            stored[f"{theirs}.bias"] = Stored(f"{ours}.bias", (outputs,), interleaved)
    return stored


def _norms(architecture: Architecture, config: Config) -> dict[str, Stored]:
    """Norms of a layer. The name `post_attention_layernorm` is that of the second norm, or of one after attention."""
    width, size, shift = config["hidden_size"], config["head_dim"], architecture.norm_shift
    names = {"input_layernorm": ("attn_norm", width)}
    if architecture.sandwich:
        names |= {
            "post_attention_layernorm": ("post_attention_norm", width),
            "pre_feedforward_layernorm": ("ffn_norm", width),
            "post_feedforward_layernorm": ("post_ffw_norm", width),
        }
    else:
        names["post_attention_layernorm"] = ("ffn_norm", width)
    if architecture.qk_norm:
        names |= {"self_attn.q_norm": ("attn_q_norm", size), "self_attn.k_norm": ("attn_k_norm", size)}
    return {
        f"{theirs}.weight": Stored(f"{ours}.weight", (length,), shift=shift) for theirs, (ours, length) in names.items()
    }


def _refuse_others(header: Header, architecture: str, stored: dict[str, Stored]) -> None:
    """Raise for the first tensor of the file that the model has no place for."""
    known = {entry.name for entry in stored.values()} | ({ROPE_FREQS} if architecture == "llama" else set())
    for name in header.tensors:
        if name not in known:
            close = nearest(name, known, 4)
            raise CheckpointError(f"{header.path}: tensor '{name}' has no place in a '{architecture}' model; {close}")
