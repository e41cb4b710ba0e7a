"""Configs from GGUF metadata."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import efficient_lm as elm
from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf import open_gguf
from efficient_lm.interop.gguf.rotary import llama3_divisors

GOLDENS = Path(__file__).parents[2] / "goldens"


def config_of(made, folder):
    return open_gguf(made.write(folder / "model.gguf")).config


def test_llama(draft, tmp_path):
    made = draft("llama")
    made.keys |= {"llama.vocab_size": 40, "llama.rope.dimension_count": 8, "tokenizer.ggml.eos_token_id": 2}
    assert config_of(made, tmp_path) == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 32,
        "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "dtype": "float32", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "eos_token_id": 2,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }  # fmt: skip


def test_what_the_file_leaves_out(draft, tmp_path):
    made = draft("llama", tied=True)
    del made.keys["llama.rope.freq_base"], made.keys["llama.attention.head_count_kv"]
    for index in range(2):
        for name in ("attn_k", "attn_v"):
            made.tensors[f"blk.{index}.{name}.weight"] = np.zeros((32, 32), np.float32)
    config = config_of(made, tmp_path)
    assert config["tie_word_embeddings"] and config["num_key_value_heads"] == 4
    assert config["rope_parameters"]["rope_theta"] == 10000.0


def test_a_window_makes_it_mistral(draft, tmp_path):
    made = draft("llama")
    made.keys["llama.attention.sliding_window"] = 24
    config = config_of(made, tmp_path)
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 24)
    assert "attention_bias" not in config


def test_values_per_layer_count_as_one_where_they_are_equal(draft, tmp_path):
    made = draft("llama")
    made.keys["llama.attention.head_count_kv"] = [2, 2]
    assert config_of(made, tmp_path)["num_key_value_heads"] == 2
    made.keys["llama.attention.head_count_kv"] = [2, 1]
    with pytest.raises(CheckpointError, match=r"'llama\.attention\.head_count_kv' differs between layers"):
        config_of(made, tmp_path)


@pytest.mark.parametrize(("architecture", "model_type"), [("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_qwen(draft, tmp_path, architecture, model_type):
    file = open_gguf(draft(architecture).write(tmp_path / "model.gguf"))
    assert file.config["model_type"] == model_type
    assert ("model.layers.0.self_attn.q_proj.bias" in file.tensors.shapes) == (architecture == "qwen2")
    assert ("model.layers.0.self_attn.q_norm.weight" in file.tensors.shapes) == (architecture == "qwen3")
    assert "model.layers.0.self_attn.o_proj.bias" not in file.tensors.shapes


def test_gemma2(draft, tmp_path):
    made = draft("gemma2")
    made.keys |= {"gemma2.attention.sliding_window": 24, "gemma2.attn_logit_softcapping": 40.0}
    config = config_of(made, tmp_path)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (40.0, 30.0)
    assert config["sliding_window"] == 24 and config["query_pre_attn_scalar"] == 8 and config["tie_word_embeddings"]


def test_gemma3(draft, tmp_path):
    made = draft("gemma3", tied=True)
    made.keys |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = config_of(made, tmp_path)
    assert config["model_type"] == "gemma3_text" and config["layer_types"] == ["sliding_attention"] * 2
    assert config["rope_parameters"] == {
        "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    assert config["attn_logit_softcapping"] is None and config["final_logit_softcapping"] is None


def test_yarn(draft, tmp_path):
    made = draft("qwen2")
    made.keys |= {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    assert config_of(made, tmp_path)["rope_parameters"] == {
        "rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0,
    }  # fmt: skip


def published_divisors(theta: float, size: int, factor: float) -> list[float]:
    """The scaling of Llama 3 frequency by frequency, as its authors published it."""
    out = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (index / size)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out


def test_scaling_of_llama_3(draft, tmp_path):
    made = draft("llama")
    made.keys["llama.rope.freq_base"] = 500000.0
    stated = np.array(published_divisors(500000.0, 8, 32.0), np.float32)
    np.testing.assert_allclose(llama3_divisors(500000.0, 64, 8.0), published_divisors(500000.0, 64, 8.0), rtol=1e-12)
    made.tensors["rope_freqs.weight"] = stated
    assert config_of(made, tmp_path)["rope_parameters"] == {
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    made.tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    assert config_of(made, tmp_path)["rope_parameters"]["rope_type"] == "default"
    made.tensors["rope_freqs.weight"] = stated * np.array([1, 1, 1, 1.1], np.float32)
    with pytest.raises(CheckpointError, match=r"'rope_freqs\.weight' holds another scaling"):
        config_of(made, tmp_path)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def test_a_model_in_gguf_computes_what_it_computes_in_hugging_face_format(draft, tmp_path):
    """The reference model of the family, written as GGUF with interleaved rows, gives the reference logits."""
    theirs = json.loads((GOLDENS / "llama" / "config.json").read_text())
    source, golden = (load_file(GOLDENS / "llama" / f"{name}.safetensors") for name in ("model", "golden"))
    made = draft("llama")
    made.keys |= {"llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-6}
    made.tensors = {
        "token_embd.weight": source["model.embed_tokens.weight"], "output.weight": source["lm_head.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }  # fmt: skip
    for index in range(2):
        for theirs_name, ours in NAMES.items():
            rows = source[f"model.layers.{index}.{theirs_name}.weight"]
            if ours in ("attn_q", "attn_k"):
                order = [head + turn + part for head in range(0, len(rows), 8) for turn in range(4) for part in (0, 4)]
                rows = rows[order]
            made.tensors[f"blk.{index}.{ours}.weight"] = rows
    path = made.write(tmp_path / "model.gguf")
    file = open_gguf(path)
    assert set(file.tensors.shapes) == set(source)
    for name, tensor in source.items():
        np.testing.assert_array_equal(file.tensors.read(name), tensor)
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "intermediate_size", "rope_parameters", "vocab_size"):
        assert file.config[key] == theirs[key]
    logits = np.asarray(elm.from_gguf(path).logits(golden["input_ids"]))
    assert np.abs(logits - golden["logits"]).max() <= 2e-5 * np.abs(golden["logits"]).max()
