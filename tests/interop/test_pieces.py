"""Tensors that are published in pieces: the three convolutions of OLMo Hybrid, which may be cut anywhere."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import efficient_lm as elm
from efficient_lm.errors import CheckpointError
from efficient_lm.interop.families import FAMILIES
from efficient_lm.interop.state import published

GOLDEN = Path(__file__).parent.parent / "goldens" / "olmo_hybrid"
NAMES = [f"model.layers.0.linear_attn.{letter}_conv1d.weight" for letter in "qkv"]


def rows(tensors):
    return [tensors[name].shape[0] for name in NAMES]


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "olmo_hybrid", copy_function=shutil.copy))


def recut(folder, lengths):
    tensors = load_file(folder / "model.safetensors")
    whole = np.concatenate([tensors[name] for name in NAMES])
    ends = np.cumsum(lengths)
    for name, start, end in zip(NAMES, ends - lengths, ends, strict=True):
        tensors[name] = np.ascontiguousarray(whole[start:end])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_any_cut_is_the_same_model_and_goes_out_as_it_came_in(folder, tmp_path):
    want = elm.from_hf(folder)
    assert rows(load_file(folder / "model.safetensors")) == [22, 22, 20]
    recut(folder, np.array([16, 16, 32]))
    got = elm.from_hf(folder)
    jax.tree.map(np.testing.assert_array_equal, want.params, got.params)
    assert rows(load_file(got.to_hf(tmp_path / "again") / "model.safetensors")) == [16, 16, 32]
    want.save(tmp_path / "run")
    kept = elm.load(tmp_path / "run").to_hf(tmp_path / "from_a_run")
    assert rows(load_file(kept / "model.safetensors")) == [22, 22, 20]


def test_a_model_of_ours_is_cut_between_queries_keys_and_values():
    model = elm.from_hf(GOLDEN)
    assert rows(dict(published(FAMILIES["olmo_hybrid"], model.model, model.params))) == [16, 16, 32]


def test_pieces_that_are_missing_or_too_short_are_named(folder):
    recut(folder, np.array([16, 16, 31]))
    with pytest.raises(CheckpointError, match=r"v_conv1d.weight' has the shape \[63, 1, 4\]"):
        elm.from_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[NAMES[1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.0.linear_attn.k_conv1d.weight'"):
        elm.from_hf(folder)


def test_other_names_are_read_and_kept(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    norm = {"attention_layer_norm": "input_layernorm", "0.feedforward_layer_norm": "0.post_attention_layernorm"}
    for old, new in norm.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = elm.from_hf(folder).to_hf(tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
