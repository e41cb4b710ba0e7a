"""Rotary positions in a GGUF file as `rope_parameters` of transformers 5."""

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from efficient_lm.errors import CheckpointError, nearest
from efficient_lm.interop.gguf.header import Header
from efficient_lm.interop.gguf.metadata import Metadata

ROPE_FREQS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def rope_parameters(keys: Metadata, theta: float) -> dict[str, Any]:
    """Base and scaling from `rope.*`.

    Raises:
        CheckpointError: a kind of scaling, or an option of it, that is not supported.
    """
    kind = keys.get("rope.scaling.type", "none")
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        parameters |= {
            "rope_type": "yarn", "factor": keys.number("rope.scaling.factor"),
            "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        }  # fmt: skip
        keys.only("rope.scaling.yarn_ext_factor", (1.0,))
    elif kind == "none":
        keys.only("rope.scaling.factor", (0.0, 1.0))
    else:
        valid = nearest(kind, ("none", "linear", "yarn"))
        raise keys.refused("rope.scaling.type", f"is '{kind}', which is not supported; {valid}")
    return parameters


def with_frequencies(header: Header, parameters: dict[str, Any], head_size: int) -> dict[str, Any]:
    """`parameters` with the scaling that `rope_freqs.weight` states: what each frequency is divided by.

    The scaling of Llama 3 (Grattafiori et al. 2024) has one free number in published models, its factor, which slow
    frequencies show as it is. The other constants are those of Llama 3 if and only if they give the tensor again.

    Raises:
        CheckpointError: the tensor is not that of Llama 3, or stands beside another scaling.
    """
    info = header.tensors.get(ROPE_FREQS)
    if info is None:
        return parameters
    if info.type != GGMLQuantizationType.F32 or info.shape != (head_size // 2,):
        raise CheckpointError(
            f"{header.path}: tensor '{ROPE_FREQS}' is {info.type.name} {list(info.shape)}, not F32 [{head_size // 2}]"
        )
    stated = np.fromfile(header.path, "<f4", info.elements, offset=info.offset)
    if np.all(stated == 1):
        return parameters
    factor = float(str(stated.max()))
    if parameters["rope_type"] != "default":
        raise CheckpointError(f"{header.path}: tensor '{ROPE_FREQS}' beside rope.scaling.type is not supported")
    scaled = {
        "rope_type": "llama3", "factor": factor, **_LLAMA3, "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }  # fmt: skip
    if not np.allclose(stated, llama3_divisors(parameters["rope_theta"], head_size, factor), rtol=1e-5, atol=0):
        raise CheckpointError(f"{header.path}: tensor '{ROPE_FREQS}' holds another scaling than that of Llama 3")
    return parameters | scaled


def llama3_divisors(theta: float, head_size: int, factor: float) -> np.ndarray:
    """What Llama 3 divides each frequency by, float64 [head_size/2]."""
    frequencies = theta ** -(np.arange(0, head_size, 2) / head_size)
    turns = _LLAMA3_CONTEXT * frequencies / (2 * math.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
