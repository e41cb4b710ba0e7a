"""The shapes that operators are measured at, and what each of them has to compute and to move.

The sets: `peers` holds the six shapes of flash-linear-attention's benchmark registry and those of published tables of
other kernels; `models` layers of the experiments of this repository; `tiny` what a CPU does in no time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmark.calls import CALLS, Call, Sizes

SETS = ("peers", "models", "tiny")

REGISTRY = [
    {"B": 1, "T": 8192, "H": 96, "K": 128},
    {"B": 2, "T": 16384, "H": 16, "K": 128},
    {"B": 4, "T": 2048, "H": 16, "K": 128},
    {"B": 4, "T": 4096, "H": 64, "K": 128},
    {"B": 8, "T": 2048, "H": 32, "K": 256},
    {"B": 8, "T": 1024, "H": 8, "K": 64},
]
"""flash-linear-attention, benchmarks/ops/registry.py: rows, tokens, heads, width of keys and of values."""


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operator at one size; see `calls` for what the sizes are."""

    op: str
    sizes: Sizes
    dtype: str = "bfloat16"

    @property
    def call(self) -> Call:
        return CALLS[self.op]

    @property
    def name(self) -> str:
        """Like "B4 T2048 H16 K128"."""
        return " ".join(f"{key}{value}" for key, value in self.sizes.items())

    def inputs(self) -> dict[str, jax.Array]:
        """Arrays by name: values that suit them, such as decays at most 0 and keys of length 1."""
        shapes = self.call.shapes(**self.sizes)
        return {name: _drawn(name, shape, self, place) for place, (name, shape) in enumerate(shapes.items())}

    def options(self) -> dict[str, Any]:
        """Keywords of the call that are no arrays."""
        return self.call.options(**self.sizes)

    def flops(self, training: bool) -> float:
        return self.call.flops(**self.sizes) * (self.call.training if training else 1)

    def bytes(self, training: bool) -> float:
        """Inputs and outputs, each crossing the memory once; forward and backward thrice."""
        shapes = self.call.shapes(**self.sizes) | self.call.outputs(**self.sizes)
        moved = sum(math.prod(shape) * _dtype(name, self).itemsize for name, shape in shapes.items())
        return moved * (3 if training else 1)

    def exponentials(self, training: bool) -> float:
        return self.call.exponentials(**self.sizes) * (2 if training else 1)

    @cached_property
    def small(self) -> "Case":
        """The same call with few rows, tokens and heads, for a definition that keeps the state of every token."""
        limits = {"B": 1, "T": 150, "S": 300, "H": 4, "G": 2, "M": 300, "E": 4}
        limits |= {"N": 100} if self.op == "linear_cross_entropy" else {}
        sizes = {key: min(value, limits[key]) if key in limits else value for key, value in self.sizes.items()}
        return Case(self.op, sizes, self.dtype)


FLOAT32 = ("dt", "A", "D", "log_decay", "log_a", "beta", "sinks", "weights", "w_head")
INTEGERS = ("labels", "group_sizes", "lengths")


def _dtype(name: str, case: Case) -> np.dtype:
    return jnp.dtype("int32" if name in INTEGERS else "float32" if name in FLOAT32 else case.dtype)


def _drawn(name: str, shape: tuple[int, ...], case: Case, place: int) -> jax.Array:
    key, dtype = jax.random.key(place), _dtype(name, case)
    if name == "group_sizes":
        # Uneven, one group empty, and all rows in some group.
        cuts = jnp.sort(jax.random.randint(key, (shape[0] - 2,), 0, case.sizes["M"] + 1))
        edges = jnp.concatenate([jnp.zeros(2, jnp.int32), cuts, jnp.full(1, case.sizes["M"])])
        return jnp.diff(edges).astype(dtype)
    if name == "labels":
        return jax.random.randint(key, shape, 0, case.sizes["V"], dtype)
    if name == "lengths":
        return jnp.full(shape, case.sizes["S"], dtype)
    if name == "weights":
        return jnp.ones(shape, dtype)
    value = jax.random.normal(key, shape)
    if name in ("A", "log_decay", "log_a"):
        value = -jnp.abs(value) if name == "A" else 0.1 * jax.nn.log_sigmoid(value)
    if name in ("dt", "beta"):
        value = 0.1 * jax.nn.softplus(value) if name == "dt" else jax.nn.sigmoid(value)
    if name == "k" and case.op == "delta_rule":
        value /= jnp.linalg.norm(value, axis=-1, keepdims=True)
    if name in ("w", "w_head"):
        value *= shape[-2] ** -0.5
    return value.astype(dtype)


def cases(op: str, group: str, dtype: str = "bfloat16") -> list[Case]:
    """The cases of an operator in one of the `SETS`."""
    return [Case(op, sizes, dtype) for sizes in _SIZES[op].get(group, [])]


def _heads(group: list[Mapping[str, int]], **more: Any) -> list[Sizes]:
    return [{**sizes, "G": sizes["H"], "V": sizes["K"], **more} for sizes in group]


_ATTENTION = [
    {"B": 4, "T": 4096, "H": 16, "G": 16, "K": 128, "V": 128},
    {"B": 4, "T": 4096, "H": 32, "G": 32, "K": 64, "V": 64},
    {"B": 1, "T": 16384, "H": 8, "G": 8, "K": 256, "V": 256},
    {"B": 2, "T": 8192, "H": 16, "G": 16, "K": 128, "V": 128},
    {"B": 1, "T": 16384, "H": 16, "G": 16, "K": 128, "V": 128},
    {"B": 1, "T": 16384, "H": 16, "G": 16, "K": 128, "V": 128, "window": 1024},
]
_MATRIX = [{**sizes, "decay": decay} for decay in ("head", "channel") for sizes in _heads(REGISTRY)]
_SIZES: dict[str, dict[str, list[Sizes]]] = {
    "selective_scan": {
        "peers": [{"B": 8, "T": 2048, "D": 4096, "N": 16}, {"B": 1, "T": 8192, "D": 4096, "N": 16}],
        "models": [{"B": 8, "T": 2048, "D": 1536, "N": 16}],
        "tiny": [{"B": 2, "T": 75, "D": 128, "N": 16}],
    },
    "linear_attention": {
        "peers": [{"B": 8, "T": 2048, "H": 64, "K": 128, "G": 1, "V": 64, "decay": "head"}, *_MATRIX],
        "models": [
            {"B": 8, "T": 2048, "H": 24, "K": 128, "G": 1, "V": 64, "decay": "head"},
            {"B": 8, "T": 2048, "H": 4, "K": 128, "G": 4, "V": 256, "decay": "channel"},
        ],
        "tiny": [
            {"B": 1, "T": 75, "H": 2, "K": 64, "G": 1, "V": 64, "decay": "head"},
            {"B": 1, "T": 75, "H": 2, "K": 64, "G": 2, "V": 64, "decay": "channel"},
        ],
    },
    "delta_rule": {
        "peers": _MATRIX,
        "models": [{"B": 8, "T": 2048, "H": 8, "K": 128, "G": 8, "V": 256, "decay": "head"}],
        "tiny": [{"B": 1, "T": 75, "H": 2, "K": 64, "G": 2, "V": 64, "decay": "head"}],
    },
    "linear_recurrence": {
        "peers": [{"B": sizes["B"], "T": sizes["T"], "D": sizes["H"] * sizes["K"]} for sizes in REGISTRY],
        "models": [{"B": 8, "T": 2048, "D": 4096}],
        "tiny": [{"B": 2, "T": 75, "D": 128}],
    },
    "short_convolution": {
        "models": [{"B": 8, "T": 2048, "D": 1536, "W": 4}, {"B": 8, "T": 2048, "D": 4096, "W": 4}],
        "tiny": [{"B": 2, "T": 75, "D": 128, "W": 4}],
    },
    "attention": {
        "peers": [*_ATTENTION, *_heads(REGISTRY)],
        "models": [{"B": 8, "T": 2048, "H": 16, "G": 16, "K": 64, "V": 64}],
        "tiny": [{"B": 1, "T": 150, "H": 4, "G": 2, "K": 64, "V": 64}],
    },
    "decode_attention": {
        "peers": [{"B": 32, "S": 32768, "H": 64, "G": 8, "K": 128}],
        "models": [{"B": 8, "S": 8192, "H": 16, "G": 4, "K": 64}],
        "tiny": [{"B": 2, "S": 300, "H": 4, "G": 2, "K": 64}],
    },
    "grouped_matmul": {
        "peers": [
            {"M": 8192, "K": 4096, "N": 14336, "E": 8},
            {"M": 131072, "K": 7168, "N": 1024, "E": 256},
            {"M": 262144, "K": 4096, "N": 1536, "E": 128},
        ],
        "models": [{"M": 65536, "K": 2048, "N": 1024, "E": 64}],
        "tiny": [{"M": 200, "K": 128, "N": 128, "E": 4}],
    },
    "linear_cross_entropy": {
        "peers": [{"N": 32768, "D": 4096, "V": 128256}, {"N": 16384, "D": 4096, "V": 131072}],
        "models": [{"N": 16384, "D": 768, "V": 50304}],
        "tiny": [{"N": 100, "D": 128, "V": 500}],
    },
}
