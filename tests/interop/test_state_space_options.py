"""Config options of the state space families: expressed exactly, or refused by name."""

import json
import math
from pathlib import Path

import pytest

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.keys import Inexpressible
from efficient_lm.models.language_model import ModelSpec

GOLDENS = Path(__file__).parent.parent / "goldens"


def config_of(name, **changes):
    config = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not ...}


def spec_of(name, **changes):
    config = config_of(name, **changes)
    return FAMILIES[config["model_type"]].spec(config)


def mixer(spec, layer=0):
    return spec.layers()[layer].mixer


def kinds(spec):
    return [layer.mixer.kind if layer.mixer else layer.ffn.kind for layer in spec.layers()]


OPTIONS = [
    ("mamba", {"time_step_rank": "auto"}, lambda s: mixer(s).resolved(32).rank, 2),
    ("mamba", {"time_step_rank": ...}, lambda s: mixer(s).resolved(32).rank, 2),
    ("mamba", {"expand": 3, "intermediate_size": 64}, lambda s: mixer(s).inner_size(32), 96),
    ("mamba", {"use_bias": True}, lambda s: (mixer(s).bias, mixer(s).output_bias), (True, True)),
    ("mamba", {"use_conv_bias": False, "conv_kernel": 3}, lambda s: (mixer(s).convolution_bias, mixer(s).convolution),
     (False, 3)),
    ("mamba", {"hidden_act": "gelu"}, lambda s: mixer(s).activation, "gelu"),
    ("mamba", {"tie_word_embeddings": ...}, lambda s: s.tied, True),
    ("falcon_mamba", {"mixer_rms_eps": 0.5}, lambda s: (mixer(s).inner_norm.epsilon, mixer(s).inner_norm.scale),
     (0.5, False)),
    ("mamba2", {"time_step_limit": [0.01, 0.5]}, lambda s: mixer(s).dt_limit, (0.01, 0.5)),
    ("mamba2", {"time_step_limit": [0.0, math.inf]}, lambda s: mixer(s).dt_limit, (0.0, None)),
    ("mamba2", {"time_step_limit": ...}, lambda s: mixer(s).dt_limit, (0.0, None)),
    ("mamba2", {"layer_norm_epsilon": 0.25}, lambda s: (s.final_norm.epsilon, mixer(s).norm_epsilon), (0.25, 0.25)),
    ("bamba", {"attn_layer_indices": None}, kinds, ["mamba2"] * 3),
    ("bamba", {"attn_layer_indices": [0, 1, 2]}, kinds, ["attention"] * 3),
    ("bamba", {"mamba_d_head": "auto", "mamba_n_heads": 4}, lambda s: mixer(s).head_size, 16),
    ("bamba", {"rope_parameters": ..., "rope_theta": 5e5}, lambda s: (mixer(s, 1).position.theta,
     mixer(s, 1).position.fraction), (5e5, 0.5)),
    ("bamba", {"hidden_act": "gelu"}, lambda s: (mixer(s).activation, s.layers()[0].ffn.kind), ("gelu", "geglu")),
    ("falcon_h1", {"mamba_rms_norm": True}, lambda s: mixer(s).first.mixer.norm, "norm_first"),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}, lambda s: mixer(s).first.mixer.norm,
     "gate_first"),
    ("falcon_h1", {"mamba_d_ssm": None}, lambda s: mixer(s).first.mixer.heads, 8),
    ("falcon_h1", {"projectors_bias": True}, lambda s: (mixer(s).first.mixer.bias, mixer(s).first.mixer.output_bias),
     (False, True)),
    ("falcon_h1", {"key_multiplier": 0.3}, lambda s: mixer(s).second.mixer.scale, 0.3 * 8**-0.5),
    ("falcon_h1", {"ssm_multipliers": [0.5, 1.0, 1.0, 1.0, 2.0]}, lambda s: mixer(s).first.mixer.multipliers,
     (0.5, 1.0, 1.0, 1.0, 2.0)),
    ("falcon_h1", {"ssm_multipliers": None, "mlp_multipliers": None}, lambda s: mixer(s).first.mixer.multipliers, None),
    ("falcon_h1", {"mlp_multipliers": [0.5, 0.25]},
     lambda s: (s.layers()[0].ffn.gate_multiplier, s.layers()[0].ffn.output_multiplier), (0.5, 0.25)),
    ("falcon_h1", {"ssm_in_multiplier": 0.5, "attention_out_multiplier": 0.75},
     lambda s: (mixer(s).first.input_multiplier, mixer(s).second.output_multiplier), (0.5, 0.75)),
    ("falcon_h1", {"embedding_multiplier": 5.5, "lm_head_multiplier": 0.25},
     lambda s: (s.embedding_multiplier, s.logit_multiplier), (5.5, 0.25)),
    ("jamba_dense", {"attn_layer_period": 8, "attn_layer_offset": 4}, kinds, ["mamba"] * 4),
    ("jamba_dense", {"attn_layer_period": 2, "attn_layer_offset": 0}, kinds, ["attention", "mamba"] * 2),
    ("jamba_dense", {"num_experts": 16, "expert_layer_period": 9, "expert_layer_offset": 7}, kinds,
     ["mamba", "attention", "mamba", "mamba"]),
    ("jamba_dense", {"mamba_dt_rank": "auto"}, lambda s: mixer(s).resolved(32).rank, 2),
    ("nemotron_h_dense", {"layers_block_type": ..., "hybrid_override_pattern": "M-*M"}, kinds,
     ["mamba2", "mlp", "attention", "mamba2"]),
    ("nemotron_h_dense", {"layers_block_type": ["mamba", "attention"]}, kinds, ["mamba2", "attention"]),
    ("nemotron_h_dense", {"time_step_min": 0.5, "time_step_limit": [0.25, 1.0]}, lambda s: mixer(s).dt_limit,
     (0.5, None)),
    ("nemotron_h_dense", {"layer_types": ["mlp"], "layers_block_type": ["mamba"], "num_hidden_layers": 2}, kinds,
     ["mlp"]),
    ("nemotron_h_dense",
     {"mamba_d_conv": 3, "mamba_n_groups": 3, "mamba_dt_min": 0.5, "mamba_conv_bias": False, "mamba_chunk_size": 8},
     lambda s: (mixer(s).convolution, mixer(s).groups, mixer(s).dt_limit, mixer(s).convolution_bias),
     (3, 3, (0.5, None), False)),
    ("nemotron_h_dense", {"mlp_hidden_act": "silu"}, lambda s: s.layers()[3].ffn.activation, "silu"),
    ("nemotron_h_dense", {"tie_word_embeddings": True}, lambda s: s.tied, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "read", "want"), OPTIONS)
def test_expressed_and_written_again(name, changes, read, want):
    spec = spec_of(name, **changes)
    assert read(spec) == want
    family = FAMILIES[config_of(name)["model_type"]]
    written = json.loads(json.dumps(family.config(spec), allow_nan=False))
    assert read(family.spec(written)) == want


REFUSED = [
    ("mamba", {"hidden_act": "mish"}, "hidden_act: 'mish'"),
    ("mamba2", {"expand": 3}, "head_dim: 8 heads of 8 are not expand * hidden_size, which is 96"),
    ("mamba2", {"time_step_limit": 0.5}, "time_step_limit: 0.5 is not a list"),
    ("falcon_h1", {"mamba_d_ssm": 48}, "mamba_d_head: 8 heads of 8 are not mamba_d_ssm = 48"),
    ("falcon_h1", {"key_multiplier": -1.0}, "key_multiplier: -1.0 is not supported"),
    ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers: [1.0] is not a list of 2 numbers"),
    ("nemotron_h_dense", {"layers_block_type": ["conv"]}, "layers_block_type: 'conv' is not supported"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError) as fault:
        spec_of(name, **changes)
    assert message in str(fault.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2", {"n_groups": 3}, "groups: 3 do not divide 8 heads"),
        ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "mixer.first.mixer.multipliers"),
    ],
)
def test_malformed_values_are_named(name, changes, message):
    with pytest.raises(CheckpointError) as fault:
        spec_of(name, **changes)
    assert message in str(fault.value)


def model_of(*mixers, ffn=None):
    blocks = {f"kind_{index}": {"mixer": mixer, "ffn": ffn} for index, mixer in enumerate(mixers)}
    return ModelSpec.model_validate({"width": 32, "vocab_size": 7, "blocks": blocks, "layout": list(blocks)})


MAMBA2 = {"kind": "mamba2", "heads": 4, "head_size": 16}
ATTENTION = {"kind": "attention", "heads": 4, "position": {"kind": "none"}}
JAMBA = {"kind": "mamba", "inner_norm": {"kind": "rmsnorm"}}
SWIGLU = {"kind": "swiglu", "hidden": 48}
PARALLEL = {"kind": "parallel", "first": {"mixer": {**MAMBA2, "norm": None}}}
BEYOND = [
    ("mamba", model_of({"kind": "mamba", "selective": False}), "mixer.selective"),
    ("mamba", model_of({"kind": "mamba", "expand": 1.5}), "mixer.expand"),
    ("mamba", model_of({"kind": "mamba2"}), "mixer.kind"),
    ("falcon_mamba", model_of({"kind": "mamba"}), "mixer.kind"),
    ("mamba2", model_of({"kind": "mamba2", "heads": 3, "head_size": 8}), "mixer.expand"),
    ("mamba2", model_of({**MAMBA2, "norm": "norm_first"}), "mixer.norm"),
    ("bamba", model_of(MAMBA2, ATTENTION, ffn=SWIGLU), "mixer.position"),
    ("nemotron_h", model_of({**MAMBA2, "dt_limit": [0.0, 0.5]}), "mixer.dt_limit"),
    ("jamba", model_of(JAMBA, *[ATTENTION] * 2, JAMBA, ffn=SWIGLU), "layout"),
    ("falcon_h1", model_of({**PARALLEL, "third": {"mixer": ATTENTION}}, ffn=SWIGLU), "mixer.third"),
    ("falcon_h1", model_of({**PARALLEL, "second": {"mixer": MAMBA2}}, ffn=SWIGLU), "mixer.kind"),
]


def test_a_parallel_model_without_a_gated_norm_is_falcon_h1():
    spec = model_of(PARALLEL, ffn=SWIGLU)
    again = FAMILIES["falcon_h1"].spec(FAMILIES["falcon_h1"].config(spec))
    assert mixer(again).first.mixer.norm is None and mixer(again).second.mixer.heads == 1


@pytest.mark.parametrize(("family", "spec", "path"), BEYOND)
def test_what_a_family_cannot_say_is_not_written(family, spec, path):
    with pytest.raises(Inexpressible) as fault:
        FAMILIES[family].config(spec)
    assert path in str(fault.value.args[0])
