"""Gemma 3n: options of its config, and parts of its models, which are models of the family again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.data.tokenizers import AbsentTokenizer
from efficient_lm.elastic.importance import most_important
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.families.base import essence
from efficient_lm.interop.families.gemma3n import FAMILY
from efficient_lm.interop.hugging_face import write_folder

GOLDENS = Path(__file__).parent.parent / "goldens"
LOCAL, FULL = "sliding_attention", "full_attention"
SHARED = {"num_hidden_layers": 4, "layer_types": [LOCAL, FULL, LOCAL, FULL], "num_kv_shared_layers": 2}
SHARED |= {"intermediate_size": 16, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "hidden_size": 16}
IDS = np.arange(40, dtype=np.int32).reshape(2, 20) * 7 % 96


def config_of(**changes):
    config = json.loads((GOLDENS / "gemma3n" / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not ...}


def ffns(spec, name):
    return [getattr(layer.ffn, name) for layer in spec.layers()]


OPTIONS = [
    ({"intermediate_size": 24}, lambda s: ffns(s, "hidden"), [24] * 5),
    ({"intermediate_size": [8, 16, 16, 24, 8]}, lambda s: ffns(s, "hidden"), [8, 16, 16, 24, 8]),
    ({"activation_sparsity_pattern": [0.95, 0.5, 0, 0, 0]}, lambda s: ffns(s, "sparsity"), [0.95, 0.5, 0, 0, 0]),
    ({"activation_sparsity_pattern": ..., "num_hidden_layers": 12, "layer_types": ..., "intermediate_size": 8},
     lambda s: ffns(s, "sparsity"), [0.95] * 10 + [0.0] * 2),
    ({"layer_types": ...}, lambda s: [layer.mixer.window for layer in s.layers()], [16, 16, 16, 16, None]),
    ({"altup_num_inputs": 3, "altup_active_idx": 1},
     lambda s: (s.layers()[0].streams.count, s.layers()[0].streams.active), (3, 1)),
    ({"altup_correct_scale": False}, lambda s: s.layers()[0].layer_input.scaled, False),
    ({"altup_coef_clip": 5.0}, lambda s: s.layers()[0].streams.coefficient_limit, 5.0),
    ({"laurel_rank": 4}, lambda s: s.layers()[0].laurel.rank, 4),
    ({"vocab_size_per_layer_input": 50}, lambda s: s.layer_embedding.vocab_size, 50),
    ({"hidden_activation": "relu"}, lambda s: (s.layers()[0].ffn.kind, s.layers()[0].layer_input.activation),
     ("reglu", "relu")),
    (SHARED, lambda s: s.build().stack.sharing.sources, [None, None, 0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "read", "want"), OPTIONS)
def test_expressed_and_written_again(changes, read, want):
    spec = FAMILY.spec(config_of(**changes))
    assert read(spec) == want
    assert read(FAMILY.spec(FAMILY.config(spec))) == want


REFUSED = [
    ({"intermediate_size": [8, 16]}, ConfigError, "intermediate_size: lists 2 layers, and num_hidden_layers is 5"),
    ({"activation_sparsity_pattern": 0.5}, CheckpointError, "activation_sparsity_pattern: 0.5 is not a list"),
    ({"num_kv_shared_layers": 5}, ConfigError, "num_kv_shared_layers: 5 of 5 layers, and the first has none before"),
    ({"num_kv_shared_layers": 1}, CheckpointError, "no layer before layer 4 has keys and values of its own"),
    ({"altup_active_idx": 2}, CheckpointError, "there is no stream 2 of 2"),
    ({"hidden_activation": "mish"}, ConfigError, "hidden_activation: 'mish'"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED)
def test_refused_by_name(changes, kind, words):
    with pytest.raises(kind) as fault:
        FAMILY.spec(config_of(**changes))
    assert words in str(fault.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of four layers, of which two take the keys and values of the others."""
    spec = FAMILY.spec(config_of(**SHARED))
    params = jax.jit(spec.build().init)(jax.random.key(0))
    folder = tmp_path_factory.mktemp("gemma3n") / "whole"
    return elm.from_hf(write_folder(folder, spec, params, AbsentTokenizer()))


PARTS = [
    ({"ffn": 0.5}, {"intermediate_size": [8] * 4}),
    ({"ffn": [1, 0.5, 0.25, 0.5]}, {"intermediate_size": [16, 8, 4, 8]}),
    ({"heads": 0.5, "ffn": {"full": 0.5}}, {"num_attention_heads": 2, "intermediate_size": [16, 8, 16, 16]}),
    ({"layers": [0, 1, 3]}, {"num_kv_shared_layers": 1, "layer_types": [LOCAL, FULL, FULL]}),
    ({"layers": [0, 1]}, {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0]}),
]


@pytest.mark.parametrize(("parts", "written"), PARTS)
def test_a_part_goes_out_and_comes_back(model, parts, written, tmp_path):
    small = model.submodel(parts)
    folder = small.to_hf(tmp_path / "part")
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in written} == written
    again = elm.from_hf(folder)
    assert essence(again.config.model) == essence(small.config.model)
    np.testing.assert_array_equal(again.logits(IDS), small.logits(IDS))


def test_tables_of_layers_that_are_left(model):
    small = model.submodel({"layers": [0, 1, 3]})
    before, after = model.params["layer_embedding"], small.params["layer_embedding"]
    np.testing.assert_array_equal(after["tokens"], before["tokens"][:, [0, 1, 3]])
    np.testing.assert_array_equal(after["projection"]["weight"], before["projection"]["weight"][:, [0, 1, 3]])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"layers": [0, 2, 3]}, "layers: layer 3 takes the keys and values of layer 1; keep both or neither"),
        ({"heads": [0.5, 1, 1, 1]}, "heads: layer 2 takes the keys and values of layer 0; both keep the same part"),
    ],
)
def test_parts_that_would_take_other_keys(model, parts, words):
    with pytest.raises(ConfigError, match=words):
        model.submodel(parts)


@pytest.mark.slow
def test_units_change_places_by_what_they_are_worth(model):
    """Layers are looked at one by one, with all that they are told; heads that several layers read stay."""
    rows = {
        "tokens": IDS, "segment_ids": np.ones_like(IDS), "weights": np.ones(IDS.shape, np.float32),
        "positions": np.broadcast_to(np.arange(20, dtype=np.int32), IDS.shape), "targets": np.roll(IDS, -1, 1),
    }  # fmt: skip
    params, chosen = most_important(model.model, model.params, {"ffn": 0.5, "heads": 0.5}, None, lambda: rows)
    assert chosen == {"ffn": 0.5, "heads": 0.5}
    before, after = (p["stack"]["segment_0"]["layer_0"] for p in (model.params, params))
    assert not np.array_equal(before["ffn"]["inner"]["down"]["weight"], after["ffn"]["inner"]["down"]["weight"])
    jax.tree.map(np.testing.assert_array_equal, before["mixer"], after["mixer"])
    want = model.logits(IDS)
    np.testing.assert_allclose(model.model.logits(params, IDS), want, atol=1e-5 * np.abs(want).max())


def test_models_of_more_than_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": config_of()}))
    with pytest.raises(ConfigError, match="model_type 'gemma3n' is text and more; .* 'gemma3n_text', is supported"):
        elm.from_hf(tmp_path)


def test_what_no_family_says(tmp_path):
    llama = elm.from_hf(GOLDENS / "llama")
    with pytest.raises(ConfigError) as fault:
        llama.submodel({"ffn": [0.5, 1]}).to_hf(tmp_path / "uneven")
    said = "of llama: block.ffn.hidden is [32, 64]; llama has one for all layers, and only gemma3n_text lists one"
    assert said in str(fault.value)
    assert not (tmp_path / "uneven").exists()
    shallow = llama.submodel({"layers": [1], "ffn": 0.5})
    again = elm.from_hf(shallow.to_hf(tmp_path / "shallow"))
    np.testing.assert_array_equal(again.logits(IDS), shallow.logits(IDS))
    with pytest.raises(ConfigError, match="numbering is .* its layers compute what they did at these places"):
        elm.from_hf(GOLDENS / "diffllama").submodel({"layers": [1]}).to_hf(tmp_path / "placed")
