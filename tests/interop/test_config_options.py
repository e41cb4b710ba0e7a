"""Config options of each family: expressed exactly, or refused by name."""

import json
from pathlib import Path

import pytest

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.families import FAMILIES

GOLDENS = Path(__file__).parent.parent / "goldens"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def config_of(name, **changes):
    config = json.loads((GOLDENS / name / "config.json").read_text())
    config |= changes
    return {key: value for key, value in config.items() if value is not ...}


def spec_of(name, **changes):
    config = config_of(name, **changes)
    return FAMILIES[config["model_type"]].spec(config)


def mixer(spec, layer=0):
    return spec.layers()[layer].mixer


OPTIONS = [
    ("llama", {"attention_bias": True}, lambda s: (mixer(s).bias, mixer(s).output_bias), (True, True)),
    ("llama", {"mlp_bias": True}, lambda s: s.layers()[0].ffn.bias, True),
    ("llama", {"hidden_act": "gelu"}, lambda s: s.layers()[0].ffn.activation, "gelu"),
    ("llama", {"hidden_act": "relu2"}, lambda s: s.layers()[0].ffn.activation, "relu_squared"),
    ("llama", {"num_key_value_heads": ...}, lambda s: mixer(s).resolved(32).kv_heads, 4),
    ("llama", {"head_dim": None}, lambda s: mixer(s).size_per_head(32), 8),
    ("llama", {"rms_norm_eps": ...}, lambda s: s.final_norm.epsilon, 1e-6),
    ("llama", {"tie_word_embeddings": True}, lambda s: s.tied, True),
    ("llama", {"initializer_range": 0.5}, lambda s: (s.init_std, s.embedding_std), (0.5, 0.5)),
    ("mistral", {"sliding_window": None}, lambda s: mixer(s).window, None),
    ("mistral", {"sliding_window": ...}, lambda s: mixer(s).window, 4096),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": ...},
     lambda s: [mixer(s, 0).window, mixer(s, 1).window], [None, 5]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
     lambda s: [mixer(s, 0).window, mixer(s, 1).window], [5, None]),
    ("gemma2", {"attn_logit_softcapping": None}, lambda s: mixer(s).softcap, None),
    ("gemma2", {"query_pre_attn_scalar": 144}, lambda s: mixer(s).scale, 144**-0.5),
    ("gemma2", {"layer_types": ...}, lambda s: [mixer(s, 0).window, mixer(s, 1).window], [16, None]),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2}, lambda s: mixer(s, 1).window, None),
    ("gpt_neox", {"use_parallel_residual": False}, lambda s: s.layers()[0].residual, "sequential"),
    ("gpt_neox", {"attention_bias": False}, lambda s: mixer(s).bias, False),
    ("gpt2", {"scale_attn_weights": False}, lambda s: mixer(s).scale, 1.0),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, lambda s: mixer(s, 1).scale, 8**-0.5 / 2),
    ("gpt2", {"n_inner": 40}, lambda s: s.layers()[0].ffn.hidden, 40),
    ("gpt2", {"reorder_and_upcast_attn": True}, lambda s: mixer(s).scale, None),
    ("diffllama", {"lambda_std_dev": 0.3}, lambda s: mixer(s).lambda_std, 0.3),
    ("olmo2", {"attention_bias": True}, lambda s: mixer(s).qk_norm_over, "all"),
    ("olmo_hybrid", {"linear_allow_neg_eigval": False}, lambda s: mixer(s).negative_eigenvalues, False),
    ("olmo_hybrid", {"linear_key_head_dim": None, "linear_value_head_dim": None},
     lambda s: (mixer(s).key_size, mixer(s).value_size), (12, 24)),
    ("olmo_hybrid", {"rope_parameters": {"rope_theta": None}}, lambda s: mixer(s, 3).position.kind, "none"),
    ("olmo_hybrid", {"hidden_act": "gelu"}, lambda s: (mixer(s).activation, s.layers()[3].ffn.kind), ("gelu", "geglu")),
    ("qwen3_next_dense", {"layer_types": ..., "full_attention_interval": 2},
     lambda s: [layer.mixer.kind for layer in s.layers()], ["gated_delta_net", "attention"] * 2),
    ("qwen3_next_dense", {"mlp_only_layers": [], "num_experts": 0}, lambda s: mixer(s, 3).position.fraction, 0.25),
    ("qwen3_next_dense", {"mlp_only_layers": [1], "decoder_sparse_step": 4, "num_hidden_layers": 3},
     lambda s: mixer(s, 2).heads, 4),
    ("kimi_linear_dense", {"layer_types": ..., "linear_attn_config": {
        "full_attn_layers": [2], "kda_layers": [1, 3, 4], "head_dim": 6, "num_heads": 3, "short_conv_kernel_size": 2}},
     lambda s: (mixer(s, 1).kind, mixer(s).key_size, mixer(s).heads, mixer(s).convolution), ("multi_latent", 6, 3, 2)),
    ("kimi_linear_dense", {"mlp_layer_types": ..., "first_k_dense_replace": 4}, lambda s: mixer(s, 3).rotary_size, 8),
    ("deepseek_v3_dense", {"rope_interleave": False}, lambda s: mixer(s).position.interleaved, False),
    ("deepseek_v3_dense", {"q_lora_rank": None}, lambda s: mixer(s).query_rank, None),
    ("deepseek_v3_dense", {"rope_parameters": ..., "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}},
     lambda s: (mixer(s).mscale, mixer(s).position.scaling.attention_factor), (1.0, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "read", "want"), OPTIONS)
def test_expressed_and_written_again(name, changes, read, want):
    spec = spec_of(name, **changes)
    assert read(spec) == want
    family = FAMILIES[config_of(name)["model_type"]]
    assert read(family.spec(family.config(spec))) == want


REFUSED = [
    ("llama", {"hidden_act": "mish"}, "hidden_act: 'mish'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type: 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type: 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: missing"),
    ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters: full_attention"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window is null or turned off"),
    ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention' is not supported"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types: lists 1 layers"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ("llama", {"is_causal": False}, "is_causal: False"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("gpt_neox", {"head_dim": 16}, "head_dim: 16 is not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True"),
    ("gpt2", {"activation_function": "gelu_10"}, "activation_function: 'gelu_10'"),
    ("kimi_linear_dense", {"layer_types": ..., "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1]}},
     "linear_attn_config: neither full_attn_layers nor kda_layers lists layer 2"),
    ("deepseek_v3_dense", {"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported; sigmoid is"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported; noaux_tc is"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported; 1 is"),
    ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func: 'softmax' is not"),
    ("kimi_linear", {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported; 1 is"),
    ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope: False is not supported; True is"),
    ("mixtral", {"partial_rotary_factor": 0.5, "rope_parameters": LLAMA3}, "partial_rotary_factor: 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError) as fault:
        spec_of(name, **changes)
    assert message in str(fault.value)


MALFORMED = [
    ("llama", {"hidden_size": "wide"}, "model.width"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, "5 heads do not divide width 32"),
    ("llama", {"num_key_value_heads": 3}, "3 do not divide 4 heads"),
    ("deepseek_v3", {"first_k_dense_replace": None}, "first_k_dense_replace: None is not a whole number"),
    ("deepseek_v3", {"norm_topk_prob": "no"}, "router.normalize: expected true or false"),
]


@pytest.mark.parametrize(("name", "changes", "message"), MALFORMED)
def test_malformed_values_are_named(name, changes, message):
    with pytest.raises(CheckpointError) as fault:
        spec_of(name, **changes)
    assert message in str(fault.value)


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
}


@pytest.mark.parametrize("kind", [None, *SCALINGS])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_both_generations_of_rotary_keys_agree(name, kind):
    scaling = SCALINGS.get(kind)
    theta_key, share_key = ("rotary_emb_base", "rotary_pct") if name == "gpt_neox" else ("rope_theta", None)
    older = {"rope_parameters": ..., theta_key: 5e5, "rope_scaling": scaling}
    newer = {"rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}}
    if share_key:
        older[share_key] = 0.5
        newer["rope_parameters"]["partial_rotary_factor"] = 0.5
    assert spec_of(name, **older) == spec_of(name, **newer)
    assert mixer(spec_of(name, **older)).position.theta == 5e5
    family = FAMILIES[name]
    written = family.config(spec_of(name, **older))
    assert family.spec({key: value for key, value in written.items() if key != "rope_parameters"}) == spec_of(
        name, **older
    )


@pytest.mark.parametrize(("name", "depth"), [("gemma2", 2), ("gemma3", 7), ("gpt_oss", 2)])
def test_a_window_that_no_layer_looks_through_is_not_written_as_null(name, depth):
    spec = spec_of(name, layer_types=["full_attention"] * depth, num_hidden_layers=depth)
    family = FAMILIES[config_of(name)["model_type"]]
    written = family.config(spec)
    assert "sliding_window" not in written
    assert family.spec(written) == spec


def test_only_absent_rotary_parameters_are_a_family_s_own():
    assert mixer(spec_of("gpt_oss", rope_parameters=None)).position.scaling.kind == "yarn"
    assert mixer(spec_of("gpt_oss", rope_parameters={})).position.scaling is None


def test_the_older_type_key_is_read():
    spec = spec_of("llama", rope_parameters=..., rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert mixer(spec).position.scaling.factor == 2.0


def test_yarn_temperature_of_two_scales():
    scaling = {**SCALINGS["yarn"], "mscale": 0.9, "mscale_all_dim": 0.7}
    position = mixer(spec_of("llama", rope_parameters={"rope_theta": 1e4, **scaling})).position
    assert position.scaling.attention_factor == pytest.approx(1.1247665 / 1.0970406, rel=1e-6)


def test_gemma3_older_keys():
    older = spec_of(
        "gemma3", rope_parameters=..., layer_types=..., rope_theta=2e6, rope_local_base_freq=500.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=3,
    )  # fmt: skip
    assert [mixer(older, i).window for i in range(6)] == [16, 16, None] * 2
    assert (mixer(older, 0).position.theta, mixer(older, 0).position.scaling) == (500.0, None)
    assert (mixer(older, 2).position.theta, mixer(older, 2).position.scaling.factor) == (2e6, 8.0)
    assert FAMILIES["gemma3_text"].spec(FAMILIES["gemma3_text"].config(older)) == older
