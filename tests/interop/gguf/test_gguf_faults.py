"""GGUF files that cannot be read: each fault is named, in one or two lines."""

import struct

import gguf
import numpy as np
import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf import open_gguf


def assert_refused(path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    text = str(caught.value)
    assert str(path) in text and text.count("\n") <= 1 and caught.value.status == 4
    for part in parts:
        assert part in text, text


def test_no_such_file(tmp_path):
    assert_refused(tmp_path / "model.gguf", "no such file")
    assert_refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGML" + bytes(40), b"PK\x03\x04" + bytes(40)])
def test_another_format(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_refused(path, "not a GGUF file")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version(draft, tmp_path, version):
    path = draft().write(tmp_path / "model.gguf")
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    path.write_bytes(raw)
    assert_refused(path, f"version {version}", "2 and 3")


def test_another_byte_order(draft, tmp_path):
    made = draft()
    made.endian = gguf.GGUFEndian.BIG
    assert_refused(made.write(tmp_path / "model.gguf"), "big-endian")


def test_a_file_cut_within_a_tensor(draft, tmp_path):
    path = draft().write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    last = gguf.GGUFReader(path).tensors[-1]
    path.write_bytes(whole[: last.data_offset + last.n_bytes - 1])
    assert_refused(path, "truncated", f"'{last.name}'", f"{last.data_offset + last.n_bytes:,}")


def test_a_file_cut_anywhere_in_its_header(draft, tmp_path):
    made = draft()
    made.keys["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    whole = made.write(tmp_path / "whole.gguf").read_bytes()
    header = gguf.GGUFReader(tmp_path / "whole.gguf").data_offset
    path = tmp_path / "model.gguf"
    for length in range(4, header, 7):
        path.write_bytes(whole[:length])
        assert_refused(path, "truncated")


def test_counts_that_cannot_be_are_not_believed(draft, tmp_path):
    """A length of many exabytes is refused before memory is reserved for it."""
    path = draft().write(tmp_path / "model.gguf")
    raw = bytearray(path.read_bytes())
    raw[24:32] = struct.pack("<Q", 1 << 62)
    path.write_bytes(raw)
    assert_refused(path, "truncated")


@pytest.mark.parametrize(
    "key",
    ["block_count", "context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"],
)
def test_a_missing_key(draft, tmp_path, key):
    made = draft()
    del made.keys[f"llama.{key}"]
    assert_refused(made.write(tmp_path / "model.gguf"), f"'llama.{key}' is missing")


def test_a_missing_architecture(draft, tmp_path):
    path = draft().write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura"))
    assert_refused(path, "'general.architecture' is missing")


def test_another_architecture(draft, tmp_path):
    made = draft("qwen2")
    made.architecture = "qwen2moe"
    assert_refused(made.write(tmp_path / "model.gguf"), "'qwen2moe'", "did you mean 'qwen2'")


def test_experts(draft, tmp_path):
    made = draft()
    made.keys |= {"llama.expert_count": 8, "llama.expert_used_count": 2}
    assert_refused(made.write(tmp_path / "model.gguf"), "'llama.expert_count' is 8", "mixtures of experts")
    made.keys["llama.expert_count"] = 0
    assert open_gguf(made.write(tmp_path / "none.gguf")).config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("llama", "rope.scaling.type", "longrope"),
        ("llama", "rope.scaling.attn_factor", 2.0),
        ("llama", "rope.dimension_count", 4),
        ("llama", "attention.value_length", 16),
        ("llama", "attention.causal", False),
        ("llama", "vocab_size", 39),
        ("llama", "context_length", 0),
        ("llama", "block_count", 4_000_000_000),
        ("llama", "attention.key_length", 7),
        ("llama", "attention.layer_norm_rms_epsilon", -1.0),
        ("qwen2", "attention.sliding_window", 8),
        ("gemma3", "attention.sliding_window_pattern", 3),
    ],
)
def test_options_that_are_not_supported(draft, tmp_path, architecture, key, value):
    made = draft(architecture)
    made.keys[f"{architecture}.{key}"] = value
    assert_refused(made.write(tmp_path / "model.gguf"), f"'{architecture}.{key}'")


def test_a_missing_tensor(draft, tmp_path):
    made = draft()
    del made.tensors["blk.1.ffn_up.weight"]
    assert_refused(made.write(tmp_path / "model.gguf"), "'blk.1.ffn_up.weight' is missing")


def test_a_tensor_of_another_shape(draft, tmp_path):
    made = draft()
    made.tensors["blk.1.ffn_up.weight"] = np.zeros((64, 16), np.float32)
    assert_refused(made.write(tmp_path / "model.gguf"), "'blk.1.ffn_up.weight'", "[64, 16]", "[64, 32]")


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.2.ffn_up.weight", "rope_factors_long.weight"])
def test_a_tensor_without_a_place(draft, tmp_path, name):
    made = draft()
    made.tensors[name] = np.zeros((64, 32), np.float32)
    assert_refused(made.write(tmp_path / "model.gguf"), f"'{name}' has no place")


def test_a_bias_where_others_have_none(draft, tmp_path):
    made = draft()
    made.tensors["blk.1.attn_q.bias"] = np.zeros(32, np.float32)
    assert_refused(made.write(tmp_path / "model.gguf"), "'blk.1.attn_q.bias' has no place")


def test_an_unknown_type(draft, tmp_path):
    path = draft().write(tmp_path / "model.gguf")
    raw = path.read_bytes()
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(raw[:at] + struct.pack("<I", 999) + raw[at + 4 :])
    assert_refused(path, "'token_embd.weight'", "999")


def test_one_part_of_several(draft, tmp_path):
    made = draft()
    made.keys |= {"split.count": 3, "split.no": 0}
    assert_refused(made.write(tmp_path / "model.gguf"), "split.count", "merge")


def test_damaged_headers_are_refused_or_read(draft, tmp_path):
    """One byte of a header changed at a time: whatever it means, the answer is a file or a named fault."""
    made = draft()
    made.keys |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b"],
        "llama.expert_count": 0,
    }
    made.keys |= {"tokenizer.ggml.scores": [0.0, -1.0, -2.0], "tokenizer.ggml.add_bos_token": False}
    path = made.write(tmp_path / "model.gguf")
    whole, header = path.read_bytes(), gguf.GGUFReader(path).data_offset
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        raw = bytearray(whole)
        raw[random.integers(4, header)] = random.choice([0, 1, 4, 8, 9, 255])
        path.write_bytes(raw)
        try:
            assert isinstance(open_gguf(path).tokenizer, dict)
            outcomes["read"] += 1
        except CheckpointError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10
