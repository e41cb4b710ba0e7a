"""Config options of RecurrentGemma, LFM2 and MiniMax: expressed exactly, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import efficient_lm as elm
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.families.base import essence
from efficient_lm.interop.hugging_face import read_json
from efficient_lm.interop.keys import Inexpressible

GOLDENS = Path(__file__).parent.parent / "goldens"


def spec_of(name, **changes):
    config = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    return FAMILIES[config["model_type"]].spec(config)


def kinds(spec):
    return [layer.mixer.kind for layer in spec.layers()]


RECURRENT_GEMMA, LFM2, MINIMAX = "recurrent_gemma", "lfm2", "minimax_dense"
ADJUSTED = {"intermediate_size": 60, "block_multiple_of": 8}
OPTIONS = [
    (RECURRENT_GEMMA, {"num_hidden_layers": 5}, kinds, ["rg_lru", "rg_lru", "attention", "rg_lru", "rg_lru"]),
    (RECURRENT_GEMMA, {"block_types": ["attention"]}, kinds, ["attention"] * 3),
    (RECURRENT_GEMMA, {"lru_width": None}, lambda s: s.layers()[0].mixer.inner, 32),
    (RECURRENT_GEMMA, {"intermediate_size": 33}, lambda s: s.layers()[0].ffn.hidden, 16),
    (RECURRENT_GEMMA, {"hidden_activation": "silu"}, lambda s: s.layers()[0].mixer.activation, "silu"),
    (RECURRENT_GEMMA, {}, lambda s: s.embedding_multiplier, 5.65625),
    (RECURRENT_GEMMA, {"rope_parameters": ..., "rope_theta": 7.0},
     lambda s: (s.layers()[2].mixer.position.theta, s.layers()[2].mixer.position.fraction), (7.0, 0.5)),
    (LFM2, ADJUSTED, lambda s: s.layers()[0].ffn.hidden, 40),
    (LFM2, {**ADJUSTED, "block_ffn_dim_multiplier": 1.1}, lambda s: s.layers()[0].ffn.hidden, 48),
    (LFM2, {**ADJUSTED, "block_auto_adjust_ff_dim": False}, lambda s: s.layers()[0].ffn.hidden, 60),
    (LFM2, {"block_ff_dim": 48, "block_auto_adjust_ff_dim": False}, lambda s: s.layers()[0].ffn.hidden, 48),
    (LFM2, {"layer_types": None, "full_attn_idxs": [2]}, kinds,
     ["short_conv", "short_conv", "attention", "short_conv"]),
    (LFM2, {"layer_types": None}, kinds, ["attention"] * 4),
    (LFM2, {"tie_embedding": False}, lambda s: s.tied, False),
    (LFM2, {"conv_bias": True}, lambda s: s.layers()[0].mixer.bias, True),
    (LFM2, {"conv_L_cache": 5}, lambda s: s.layers()[0].mixer.convolution, 5),
    (MINIMAX, {"layer_types": None}, kinds, ["attention", "lightning"] * 2),
    (MINIMAX, {"sliding_window": 5}, lambda s: s.layers()[1].mixer.window, 5),
    (MINIMAX, {"head_dim": 16}, lambda s: s.layers()[0].mixer.state_shape(32), (4, 16, 16)),
    (MINIMAX, {"hidden_act": "relu"}, lambda s: (s.layers()[0].mixer.value_activation, s.layers()[0].ffn.expert.kind),
     ("relu", "reglu")),
    (MINIMAX, {"full_attn_beta_factor": 3, "mlp_beta_factor": 2}, lambda s: s.layers()[1].residual_multiplier.mixer, 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "read", "want"), OPTIONS)
def test_expressed_both_ways(name, changes, read, want):
    spec = spec_of(name, **changes)
    assert read(spec) == want
    family = FAMILIES["minimax" if name == MINIMAX else name]
    assert essence(family.spec(family.config(spec))) == essence(spec)


def test_minimax_comes_with_its_decays_which_are_no_others(tmp_path):
    held = [f"model.layers.0.self_attn.{name}_decay" for name in ("query", "key", "diagonal")]
    held.append("model.layers.0.self_attn.slope_rate")
    model = elm.from_hf(GOLDENS / MINIMAX)
    tensors = load_file(model.to_hf(tmp_path / "again") / "model.safetensors")
    assert tensors.keys() >= set(held)
    rounded = model.to_hf(tmp_path / "rounded", dtype="bfloat16")
    assert load_file(rounded / "model.safetensors")[held[0]].dtype == np.float32
    save_file({**tensors, held[3]: 1.5 * tensors[held[3]]}, tmp_path / "again" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{held[3]}' has other values than follow from config.json"):
        elm.from_hf(tmp_path / "again")
    config = read_json(rounded / "config.json") | {"block_size": 4}
    (rounded / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{held[0]}' has other values"):
        elm.from_hf(rounded)


REFUSED = [
    (RECURRENT_GEMMA, {"block_types": ["recurrent", "atention"]}, "block_types: 'atention' is not supported; did you"),
    (RECURRENT_GEMMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
     "rope_parameters.rope_type: 'linear' is not supported; default is"),
    (RECURRENT_GEMMA, {"lru_width": 30}, "mixer.heads: 4 do not divide 30 inner channels"),
    (LFM2, {"layer_types": ["conv", "mamba", "conv", "conv"]}, "layer_types: 'mamba' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_refused_by_name(name, changes, words):
    with pytest.raises((ConfigError, CheckpointError)) as error:
        spec_of(name, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


CHANGED = [
    (RECURRENT_GEMMA, {"embedding_multiplier": 1.0}, {}, "embedding_multiplier"),
    (RECURRENT_GEMMA, {"logit_softcap": None}, {}, "logit_softcap"),
    (LFM2, {}, {"norm_position": "sandwich"}, "norm_position"),
    (MINIMAX, {}, {"norm_position": "pre"}, "norm_position"),
]


@pytest.mark.parametrize(("name", "model", "block", "words"), CHANGED)
def test_what_a_family_cannot_say_is_not_written(name, model, block, words):
    spec = spec_of(name)
    blocks = {part: found.model_copy(update=block) for part, found in spec.blocks.items()}
    with pytest.raises(Inexpressible, match=words):
        FAMILIES["minimax" if name == MINIMAX else name].config(spec.model_copy(update={**model, "blocks": blocks}))
