"""Tensors of GGUF files: element types, pieces, the order of rows, shifted norms, and the memory they take."""

import subprocess
import sys
from collections.abc import Callable

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf import open_gguf
from efficient_lm.interop.gguf.tensors import PLAIN, READABLE

UP = "model.layers.0.mlp.up_proj.weight"


def half(raw: np.ndarray) -> np.ndarray:
    """float16 in two bytes as float64."""
    return raw.copy().view(np.float16).astype(np.float64)


def low_high(raw: np.ndarray) -> np.ndarray:
    """The low half bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.float64)


def q4_0(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * (low_high(block[2:]) - 8)


def q4_1(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * low_high(block[4:]) + half(block[2:4])


def q8_0(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * block[2:].view(np.int8)


def q4_k(block: np.ndarray) -> np.ndarray:
    """Eight runs of 32: a 6-bit scale and minimum each, over a float16 scale and minimum of the whole block."""
    packed, quants, out = block[4:16].astype(int), block[16:], []
    for run in range(8):
        if run < 4:
            scale, minimum = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = (packed[run + 4] & 15) | (packed[run - 4] >> 6) << 4
            minimum = (packed[run + 4] >> 4) | (packed[run] >> 6) << 4
        bytes_ = quants[run // 2 * 32 : run // 2 * 32 + 32]
        values = bytes_ >> 4 if run % 2 else bytes_ & 15
        out.append(half(block[:2]) * scale * values - half(block[2:4]) * minimum)
    return np.concatenate(out)


def q6_k(block: np.ndarray) -> np.ndarray:
    """Six-bit values: four bits low, two bits high, sixteen 8-bit scales, a float16 scale of the whole block."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8)
    out = np.zeros(256)
    for index in range(256):
        part, inside = divmod(index, 128)
        quarter, lane = divmod(inside, 32)
        byte = low[part * 64 + lane + 32 * (quarter % 2)]
        value = (byte >> 4 if quarter >= 2 else byte & 15) | ((high[part * 32 + lane] >> 2 * quarter) & 3) << 4
        out[index] = float(half(block[208:])[0]) * scales[index // 16] * (value - 32)
    return out


FORMATS = {
    Type.Q4_0: (q4_0, (0,)), Type.Q4_1: (q4_1, (0, 2)), Type.Q8_0: (q8_0, (0,)),
    Type.Q4_K: (q4_k, (0, 2)), Type.Q6_K: (q6_k, (208,)),
}  # fmt: skip
"""Type → independent decoding of one block, and where its float16 scales are."""


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_quantised_blocks_are_decoded_as_their_format_says(draft, random_blocks, tmp_path, kind):
    decode, scales = FORMATS[kind]
    made = draft()
    # The width of K-quants is a multiple of 256.
    made.keys |= {"llama.embedding_length": 256, "llama.attention.key_length": 64, "llama.block_count": 1}
    shapes = {"token_embd": (40, 256), "output": (40, 256), "blk.0.ffn_up": (64, 256), "blk.0.ffn_gate": (64, 256)}
    shapes |= {"blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256)}
    shapes |= {"blk.0.attn_output": (256, 256), "blk.0.ffn_down": (256, 64)}
    made.tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    made.tensors |= {
        f"{name}.weight": np.ones(256, np.float32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    }
    raw = random_blocks(kind, 64, 256, scales)
    made.tensors["blk.0.ffn_up.weight"] = (raw, kind)
    tensors = open_gguf(made.write(tmp_path / "model.gguf")).tensors
    size = gguf.GGML_QUANT_SIZES[kind][1]
    expected = np.concatenate([decode(block) for block in raw.reshape(-1, size)]).reshape(64, 256)
    assert tensors.shapes[UP] == (64, 256) and tensors.dtypes[UP] == "float32"
    np.testing.assert_allclose(tensors.read(UP), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(tensors.read(UP, 5, 9), tensors.read(UP)[5:9])


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_quantised_weights_are_close_to_their_source(draft, tmp_path, kind):
    made = draft()
    source = made.tensors["blk.0.ffn_up.weight"]
    made.tensors["blk.0.ffn_up.weight"] = (gguf.quantize(source, kind), kind)
    read = open_gguf(made.write(tmp_path / "model.gguf")).tensors.read(UP)
    steps = 127 if kind == Type.Q8_0 else 7
    assert 0 < np.abs(read - source).max() < np.abs(source).max() / steps


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_plain_types_keep_every_bit(draft, tmp_path, name):
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    kind = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16}[name]
    made = draft()
    source = made.tensors["blk.0.ffn_up.weight"].astype(dtype)
    made.tensors["blk.0.ffn_up.weight"] = (source.view(np.uint8), kind) if name == "bfloat16" else source
    file = open_gguf(made.write(tmp_path / "model.gguf"))
    read = file.tensors.read(UP)
    assert file.tensors.dtypes[UP] == name and read.dtype == dtype
    np.testing.assert_array_equal(read.view(np.uint8), source.view(np.uint8))


def test_a_file_of_one_dtype_says_so(draft, tmp_path):
    made = draft()
    made.tensors = {name: value.astype(np.float16) if value.ndim > 1 else value for name, value in made.tensors.items()}
    assert open_gguf(made.write(tmp_path / "half.gguf")).config["dtype"] == "float16"
    made.tensors["output.weight"] = made.tensors["output.weight"].astype(np.float32)
    assert open_gguf(made.write(tmp_path / "mixed.gguf")).config["dtype"] == "float32"


def rotate(x: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Rotary positions on `x` [time, heads, size]: pair i turns at its own speed."""
    out = np.empty_like(x)
    for turn, (first, second) in enumerate(pairs):
        angle = np.arange(len(x))[:, None] * (0.3 + turn)
        cosine, sine = np.cos(angle), np.sin(angle)
        out[..., first] = x[..., first] * cosine - x[..., second] * sine
        out[..., second] = x[..., second] * cosine + x[..., first] * sine
    return out


def test_rows_of_queries_and_keys_are_put_in_half_split_order(draft, tmp_path):
    """Interleaved rotation of the file's heads gives the scores that half-split rotation of ours gives."""
    made = draft()
    tensors = open_gguf(made.write(tmp_path / "model.gguf")).tensors
    size, heads, kv_heads = 8, 4, 2
    x = np.random.default_rng(2).normal(size=(5, 32))
    interleaved = [(2 * i, 2 * i + 1) for i in range(size // 2)]
    halves = [(i, i + size // 2) for i in range(size // 2)]

    def scores(query: np.ndarray, key: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
        q = rotate((x @ query.T).reshape(5, heads, size), pairs)
        k = np.repeat(rotate((x @ key.T).reshape(5, kv_heads, size), pairs), heads // kv_heads, axis=1)
        return np.einsum("ihd,jhd->hij", q, k)

    theirs = scores(made.tensors["blk.1.attn_q.weight"], made.tensors["blk.1.attn_k.weight"], interleaved)
    query, key = (tensors.read(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qk")
    np.testing.assert_allclose(scores(query, key, halves), theirs, rtol=1e-10)
    assert not np.allclose(scores(query, key, interleaved), theirs)
    value = tensors.read("model.layers.1.self_attn.v_proj.weight")
    np.testing.assert_array_equal(value, made.tensors["blk.1.attn_v.weight"])


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm"])
def test_pieces_make_the_whole(draft, tmp_path, name):
    tensors = open_gguf(draft().write(tmp_path / "model.gguf")).tensors
    name = f"model.layers.0.{name}.weight"
    whole = tensors.read(name)
    assert whole.shape == tensors.shapes[name]
    for start, stop in ((0, 3), (3, 11), (7, 9), (15, None), (4, 4), (-2, None), (0, 10**6)):
        np.testing.assert_array_equal(tensors.read(name, start, stop), whole[start:stop])


def test_biases_of_queries_and_keys_are_put_in_order_too(draft, tmp_path):
    made = draft()
    for index in range(2):
        for name, rows in {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}.items():
            made.tensors[f"blk.{index}.{name}.bias"] = np.arange(rows, dtype=np.float32)
    file = open_gguf(made.write(tmp_path / "model.gguf"))
    assert file.config["attention_bias"] and not file.config["mlp_bias"]
    bias = file.tensors.read("model.layers.0.self_attn.k_proj.bias")
    assert bias.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert file.tensors.read("model.layers.0.self_attn.v_proj.bias").tolist() == list(range(16))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_other_architectures_keep_their_rows(draft, tmp_path, architecture):
    made = draft(architecture)
    tensors = open_gguf(made.write(tmp_path / "model.gguf")).tensors
    for ours, theirs in {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down"}.items():
        read = tensors.read(f"model.layers.1.{ours}.weight")
        np.testing.assert_array_equal(read, made.tensors[f"blk.1.{theirs}.weight"])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_norms_of_gemma_lose_what_was_added(draft, tmp_path, architecture):
    made = draft(architecture)
    zeros = {name: np.ones_like(value) for name, value in made.tensors.items() if name.endswith("norm.weight")}
    tensors = open_gguf_with(made, zeros, tmp_path).tensors
    norms = [name for name in tensors.shapes if "norm" in name]
    assert len(norms) == 1 + 2 * len([name for name in zeros if name.startswith("blk.0.")])
    for name in norms:
        assert not tensors.read(name).any()


def open_gguf_with(made, tensors, folder):
    made.tensors |= tensors
    return open_gguf(made.write(folder / "model.gguf"))


def test_alignment_of_the_file_is_honoured(draft, tmp_path):
    made = draft()
    made.alignment = 256
    tensors = open_gguf(made.write(tmp_path / "model.gguf")).tensors
    np.testing.assert_array_equal(tensors.read(UP), made.tensors["blk.0.ffn_up.weight"])


def test_header_agrees_with_the_package(draft, tmp_path):
    from efficient_lm.interop.gguf.header import read_header

    made = draft()
    made.keys |= {
        "general.name": "naïve",
        "a.list": [1, -2, 3],
        "a.flag": True,
        "a.words": ["x", "", "ÿ"],
        "a.rate": 0.1,
    }
    path = made.write(tmp_path / "model.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    theirs["a.rate"], theirs["llama.attention.layer_norm_rms_epsilon"] = 0.1, 1e-5
    assert dict(header.metadata) == theirs
    assert [(info.name, info.offset, info.bytes) for info in header.tensors.values()] == [
        (tensor.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    ]


def test_a_tensor_in_a_type_that_cannot_be_decoded_is_refused(draft, tmp_path):
    made = draft()
    made.tensors["blk.0.ffn_down.weight"] = (np.zeros((32, 80), np.uint8), Type.Q8_1)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_down\.weight' is stored as Q8_1"):
        open_gguf(made.write(tmp_path / "model.gguf"))


MEASURE = """
import resource, sys
from efficient_lm.interop.gguf import open_gguf
from efficient_lm.interop.gguf.tensors import PLAIN, READABLE
file = open_gguf(sys.argv[1])
name = "model.embed_tokens.weight"
file.tensors.read(name, 0, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = file.tensors.shapes[name][0]
total = sum(float(file.tensors.read(name, start, start + 4096)[:, 0].sum()) for start in range(0, rows, 4096))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, total)
"""


def test_reading_in_pieces_keeps_nothing_of_the_file(draft, tmp_path):
    made: Callable = draft(tied=True)
    made.tensors["token_embd.weight"] = np.ones((1 << 19, 32), np.float32)
    path = made.write(tmp_path / "model.gguf")
    output = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True).stdout
    grown, total = output.split()
    assert float(total) == 1 << 19
    assert int(grown) < 16 * 1024, f"{grown} KiB for a file of 64 MiB"


@pytest.mark.parametrize("kind", sorted(READABLE - set(PLAIN), key=lambda kind: kind.name))
def test_the_package_decodes_every_type_that_is_let_in(kind):
    values, size = gguf.GGML_QUANT_SIZES[kind]
    decoded = gguf.quants.dequantize(np.zeros((2, size), np.uint8), kind)
    assert decoded.shape == (2, values) and decoded.dtype == np.float32
