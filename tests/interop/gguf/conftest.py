"""Small GGUF files: a model of each architecture with random weights, as a converter would write it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

VOCAB, WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 40, 32, 4, 2, 64, 2
SIZE = WIDTH // HEADS


@dataclass
class Draft:
    """A file in the making.

    Attributes:
        keys: metadata by full key; ints become uint32, floats float32.
        tensors: name → values, or (bytes, type).
    """

    architecture: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    alignment: int | None = None
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE

    def write(self, path: Path) -> Path:
        """Write the file with the package's own writer."""
        writer = gguf.GGUFWriter(path, self.architecture, endianess=self.endian)
        if self.alignment:
            writer.add_custom_alignment(self.alignment)
        for key, value in self.keys.items():
            put(writer, key, value)
        for name, value in self.tensors.items():
            if isinstance(value, tuple):
                writer.add_tensor(name, value[0], raw_dtype=value[1])
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def sizes(architecture: str) -> dict[str, Any]:
    """The keys that every architecture needs."""
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
            "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0,
        }.items()
    }  # fmt: skip


def weights(architecture: str, tied: bool = False) -> dict[str, np.ndarray]:
    """Random float32 tensors under GGUF names."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    if not tied and not architecture.startswith("gemma2"):
        shapes["output"] = (VOCAB, WIDTH)
    layer = {
        "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (KV_HEADS * SIZE, WIDTH),
        "attn_v": (KV_HEADS * SIZE, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    if architecture.startswith("gemma"):
        layer |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
    if architecture in ("qwen3", "gemma3"):
        layer |= {"attn_q_norm": (SIZE,), "attn_k_norm": (SIZE,)}
    shapes |= {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    tensors = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if architecture == "qwen2":
        for index in range(LAYERS):
            for name in ("attn_q", "attn_k", "attn_v"):
                rows = tensors[f"blk.{index}.{name}.weight"].shape[0]
                tensors[f"blk.{index}.{name}.bias"] = random.normal(size=rows).astype(np.float32)
    return tensors


@pytest.fixture
def draft() -> Callable[..., Draft]:
    """``draft("llama", tied=True)``: a complete model without a tokenizer, to be changed and written."""

    def make(architecture: str = "llama", tied: bool = False) -> Draft:
        made = Draft(architecture, sizes(architecture), weights(architecture, tied))
        if architecture == "gemma3":
            made.keys["gemma3.attention.sliding_window"] = 16
        return made

    return make


@pytest.fixture
def random_blocks() -> Callable[[Type, int], np.ndarray]:
    """Valid blocks of a quantised type with random contents: float16 scales of ordinary size, any other bytes."""

    def make(kind: Type, rows: int, columns: int, scales: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng(1)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (rows * columns // block, size), np.uint8)
        for offset in scales:
            values = random.uniform(-0.1, 0.1, len(raw)).astype(np.float16)
            raw[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
        return raw.reshape(rows, -1)

    return make
