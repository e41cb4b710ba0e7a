"""Families with experts: their config options, and their tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import efficient_lm as elm
from efficient_lm.errors import CheckpointError
from efficient_lm.interop.description import Interleaved, Source, Tensor, each, linear
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.families.base import essence
from efficient_lm.interop.hugging_face import read_json
from efficient_lm.interop.keys import Inexpressible
from efficient_lm.models.parameters import ZEROS, Declaration

GOLDENS = Path(__file__).parent.parent / "goldens"


def config_of(name, **changes):
    config = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not ...}


def spec_of(name, **changes):
    return FAMILIES[name].spec(config_of(name, **changes))


def ffns(spec):
    return [layer.ffn and layer.ffn.kind for layer in spec.layers()]


def moe(spec):
    return next(layer.ffn for layer in spec.layers() if layer.ffn and layer.ffn.kind == "moe")


YARN = {"rope_parameters": ..., "rope_theta": ...}
LIST = ["sparse", "dense", "dense", "sparse"]
OPTIONS = [
    ("mixtral", {"num_experts": 3}, lambda s: moe(s).experts, 3),
    ("mixtral", {"num_local_experts": ..., "num_experts_per_tok": ...}, lambda s: (moe(s).experts, moe(s).top_k),
     (8, 2)),
    ("mixtral", {"hidden_act": "relu2"}, lambda s: moe(s).expert.activation, "relu_squared"),
    ("olmoe", {"norm_topk_prob": True}, lambda s: moe(s).router.normalize, True),
    ("olmoe", {"clip_qkv": 8.0}, lambda s: s.layers()[0].mixer.clip, 8.0),
    ("olmoe", {"num_local_experts": 3}, lambda s: moe(s).experts, 3),
    ("qwen3_moe", {"mlp_only_layers": [0]}, ffns, ["swiglu", "moe"]),
    ("qwen3_moe", {"decoder_sparse_step": 2}, ffns, ["swiglu", "moe"]),
    ("qwen3_moe", {"num_local_experts": 0}, ffns, ["swiglu", "swiglu"]),
    ("qwen3_moe", {"num_local_experts": ..., "num_experts": 3, "mlp_only_layers": None}, lambda s: moe(s).experts, 3),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}, lambda s: s.layers()[1].mixer.window, 5),
    ("qwen3_moe", {"sliding_window": 5}, lambda s: s.layers()[1].mixer.window, None),
    ("gpt_oss", {"layer_types": ..., "sliding_window": ...}, lambda s: [x.mixer.window for x in s.layers()],
     [128, None]),
    ("gpt_oss", {"swiglu_limit": 3.0, "swiglu_alpha": ...}, lambda s: (moe(s).expert.limit, moe(s).expert.slope),
     (3.0, 1.702)),
    ("gpt_oss", YARN, lambda s: s.layers()[0].mixer.position.scaling.factor, 32.0),
    ("gpt_oss", {"attention_bias": ...}, lambda s: s.layers()[0].mixer.output_bias, True),
    ("deepseek_v3", {"n_shared_experts": 3}, lambda s: (moe(s).shared.hidden, moe(s).expert.hidden), (48, 16)),
    ("deepseek_v3", {"n_shared_experts": 0}, lambda s: moe(s).shared, None),
    ("deepseek_v3", {"first_k_dense_replace": 0}, ffns, ["moe", "moe"]),
    ("deepseek_v3", {"n_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
     lambda s: (moe(s).router.groups, moe(s).router.normalize, moe(s).router.scale), (1, False, 1.5)),
    ("minimax", {"num_local_experts": 1}, lambda s: moe(s).experts, 1),
    ("jamba", {"expert_layer_offset": 0}, ffns, ["moe", "swiglu"] * 2),
    ("jamba", {"expert_layer_period": 3, "expert_layer_offset": 0, "attn_layer_period": 4},
     lambda s: [(x.mixer.kind, x.ffn.kind) for x in s.layers()],
     [("mamba", "moe"), ("attention", "swiglu"), ("mamba", "swiglu"), ("mamba", "moe")]),
    ("jamba", {"num_local_experts": 1}, ffns, ["swiglu"] * 4),
    ("nemotron_h", {"layers_block_type": ..., "hybrid_override_pattern": "ME*-"}, ffns, [None, "moe", None, "mlp"]),
    ("nemotron_h", {"moe_latent_size": 8, "mlp_bias": True},
     lambda s: (moe(s).latent, moe(s).latent_bias, moe(s).shared.bias, moe(s).expert.bias), (8, True, True, False)),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, lambda s: (moe(s).expert.activation, moe(s).shared.activation),
     ("silu", "silu")),
    ("nemotron_h", {"layer_types": ["moe", "mlp"]}, ffns, ["moe", "mlp"]),
    ("nemotron_h", {"moe_shared_expert_intermediate_size": 0, "intermediate_size": 24, "mlp_bias": True},
     lambda s: (moe(s).shared.hidden, moe(s).shared.bias), (24, True)),
    ("qwen3_next", {"mlp_only_layers": [1]}, ffns, ["moe", "swiglu", "moe", "moe"]),
    ("qwen3_next", {"shared_expert_intermediate_size": 40}, lambda s: (moe(s).shared.hidden, moe(s).shared_gate),
     (40, True)),
    ("kimi_linear", {"mlp_layer_types": LIST}, lambda s: [f == "moe" for f in ffns(s)], [True, False, False, True]),
    ("kimi_linear", {"mlp_layer_types": ..., "first_k_dense_replace": 3}, ffns, ["swiglu"] * 3 + ["moe"]),
    ("kimi_linear", {"num_experts": ..., "num_local_experts": 6, "num_expert_group": ..., "n_group": 3,
                     "topk_group": 2},
     lambda s: (moe(s).experts, moe(s).router.groups, moe(s).router.top_groups), (6, 3, 2)),
    ("kimi_linear", {"moe_renormalize": False, "norm_topk_prob": True, "num_shared_experts": 2, "n_shared_experts": 3},
     lambda s: (moe(s).router.normalize, moe(s).shared.hidden), (False, 32)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "read", "want"), OPTIONS)
def test_expressed_and_written_again(name, changes, read, want):
    spec = spec_of(name, **changes)
    assert read(spec) == want
    written = FAMILIES[name].config(spec)
    assert read(FAMILIES[name].spec(written)) == want
    # Keys of the config that it came with, under whatever name, do not undo what is written.
    kept = {**config_of(name, **changes), **written}
    assert essence(FAMILIES[name].spec(kept)) == essence(spec)


MALFORMED = [
    ("mixtral", {"num_experts_per_tok": 5}, "ffn.top_k: 5, but there are 4 experts"),
    ("deepseek_v3", {"n_group": 3}, "ffn.router.groups: 3 groups do not divide 4 experts"),
    ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts: None is not a whole number"),
    ("kimi_linear", {"moe_intermediate_size": None}, "counts experts, and their size is None"),
    ("kimi_linear", {"linear_attn_config": [1]}, "linear_attn_config: [1] is not a mapping"),
    ("kimi_linear", {"mlp_layer_types": 1}, "mlp_layer_types: 1 is not a list"),
    ("minimax", {"rope_parameters": "yarn"}, "rope_parameters: 'yarn' is not a mapping"),
    ("minimax", {"hidden_act": ["silu"]}, "hidden_act: ['silu'] is not supported"),
    ("qwen3_next", {"mlp_only_layers": 1}, "mlp_only_layers: 1 is not a list"),
    ("jamba", {"num_experts": None}, "num_experts: None is not a whole number of at least 0"),
    ("jamba", {"attn_layer_offset": None}, "attn_layer_offset: None is not a whole number of at least 0"),
    ("nemotron_h", {"layers_block_type": []}, "layers_block_type: lists no layers"),
]


@pytest.mark.parametrize(("name", "changes", "message"), MALFORMED)
def test_malformed_values_are_named(name, changes, message):
    with pytest.raises(elm.errors.UserError) as fault:
        spec_of(name, **changes)
    assert message in str(fault.value)


CHANGED = [
    ("mixtral", {"dispatch": {"capacity_factor": 1.0}}, "dispatch"),
    ("mixtral", {"router": {"scores": "sigmoid", "normalize": True}}, "scores"),
    ("deepseek_v3", {"shared": {"kind": "swiglu", "hidden": 24}}, "shared.hidden"),
    ("qwen3_next", {"shared": {"kind": "reglu", "hidden": 16}}, "shared.kind"),
    ("gpt_oss", {"expert": {"kind": "swiglu", "bias": True, "hidden": 64}}, "expert.kind"),
    ("nemotron_h", {"shared": None}, "shared"),
]


@pytest.mark.parametrize(("name", "changes", "words"), CHANGED)
def test_what_a_family_cannot_say_is_not_written(name, changes, words):
    spec = spec_of(name)
    plain = spec.dump()
    for block in plain["blocks"].values():
        if block["ffn"] and block["ffn"]["kind"] == "moe":
            block["ffn"] |= changes
    with pytest.raises(Inexpressible, match=words):
        FAMILIES[name].config(type(spec).model_validate(plain))


def test_the_balance_loss_is_the_reference_s_where_it_has_one():
    assert moe(spec_of("olmoe")).balance.load_balance == 0
    trained = spec_of("olmoe", output_router_logits=True)
    assert moe(trained).balance.load_balance == 0.01
    assert FAMILIES["olmoe"].config(trained)["router_aux_loss_coef"] == 0.01
    assert essence(trained) == essence(spec_of("olmoe"))
    assert moe(spec_of("deepseek_v3")).balance.correction_rate == 1e-3


@pytest.fixture
def mixtral(tmp_path):
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDENS / "mixtral" / "config.json").read_bytes())
    return folder, load_file(GOLDENS / "mixtral" / "model.safetensors")


def test_missing_and_superfluous_experts_are_named(mixtral):
    folder, tensors = mixtral
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors["model.layers.1.block_sparse_moe.experts.4.w2.weight"] = tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model.layers.1.block_sparse_moe.experts.4.w2"):
        elm.from_hf(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor '.*experts.3.w2.weight'"):
        elm.from_hf(folder)


def test_a_map_without_values_belongs_to_nothing(tmp_path):
    folder = tmp_path / "deepseek"
    folder.mkdir()
    config = config_of("deepseek_v3", n_shared_experts=0)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDENS / "deepseek_v3" / "model.safetensors")
    for name in [name for name in tensors if "shared" in name]:
        tensors[name] = tensors[name][:, :0] if "down" in name else tensors[name][:0]
    save_file(tensors, folder / "model.safetensors")
    model = elm.from_hf(folder)
    assert moe(model.config.model).shared is None
    again = read_json(model.to_hf(tmp_path / "again") / "config.json")
    assert {name: again[name] for name in config} == config


@pytest.mark.parametrize("name", ["nemotron_h", "qwen3_next"])
def test_the_module_that_predicts_further_tokens_is_left_out(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDENS / name / "config.json").read_bytes())
    tensors = load_file(GOLDENS / name / "model.safetensors")
    save_file({**tensors, "mtp.norm.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    again = elm.from_hf(folder).to_hf(tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == tensors.keys()


def test_a_stacked_parameter_is_seen_expert_by_expert_and_in_turn():
    declared = Declaration((3, 4, 2, 5), ("experts", "embed", "gate_up", "mlp"), True, ((1,), (3,)), ZEROS)
    ours = np.arange(120.0).reshape(declared.shape)
    weight = each(*linear("experts.{}.up", "gate_up", 1))[0]
    names = [one.name for one in weight.numbered(3)]
    assert names == ["experts.0.up.weight", "experts.1.up.weight", "experts.2.up.weight"]
    view = weight.numbered(3)[2].views([ours], [declared])[0]
    np.testing.assert_array_equal(view, ours[2, :, 1].T)
    assert np.shares_memory(view, ours)
    fused = Tensor("both", (Source("gate_up", 0), Source("gate_up", 1)), "same", Interleaved())
    views = fused.views([ours, ours], [declared, declared])
    whole = np.zeros(fused.join.shape(views, declared))
    for mine, theirs in fused.pairs(whole, views, declared):
        theirs[...] = mine
    np.testing.assert_array_equal(whole, ours.transpose(0, 1, 3, 2).reshape(3, 4, 10))
