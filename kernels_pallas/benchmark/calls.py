"""Every operator as a call that can be measured: its arrays, its work, and the function itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kernels_pallas.attention import attention
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_cross_entropy import linear_cross_entropy
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.short_convolution import short_convolution

Sizes = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
CHUNK = 64
"""Tokens that chunked forms of matrix recurrences compute together, in the count of their FLOPs."""


@dataclass(frozen=True)
class Call:
    """What an operator does at given sizes; every function takes them as keywords.

    Attributes:
        function: the operator; takes the arrays and options by name, and `implementation`.
        shapes, outputs: of named arrays. flops: of products, forward. exponentials: forward.
        options: keywords that are no arrays.
        training: forward and backward in forwards; 0 for an operator without a gradient.
    """

    function: Callable[..., Any]
    shapes: Callable[..., Shapes]
    outputs: Callable[..., Shapes]
    flops: Callable[..., float]
    exponentials: Callable[..., float] = lambda **sizes: 0.0
    options: Callable[..., dict[str, Any]] = lambda **sizes: {}
    training: float = 3.0


def _head_shapes(B, T, H, K, G, V, decay=None, **_) -> Shapes:
    shapes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
    decays = {"head": (B, T, H), "channel": (B, T, H, K)}
    return shapes | ({"log_decay": decays[decay]} if decay else {})


def _matrix_flops(B, T, H, K, G, V, **_) -> float:
    """Products of a chunk's queries and keys, with its values, and with the state; causal halves are counted whole."""
    return 2 * B * T * (CHUNK * K * G + CHUNK * V * H + 2 * K * V * H)


def _delta_flops(B, T, H, K, V, **_) -> float:
    """Besides, the products that make the corrections, and the products with the inverse."""
    return 2 * B * T * H * (2 * CHUNK * K + CHUNK * (K + 2 * V) + 3 * K * V)


def _channel_exponentials(B, T, H, K, decay=None, **_) -> float:
    return B * T * H * (K * 18 if decay == "channel" else CHUNK)


def _attention_pairs(B, T, H, window=None, **_) -> float:
    """Pairs of a query and a key that it sees."""
    reach = min(window or T, T)
    return B * H * (reach * (reach + 1) / 2 + (T - reach) * reach)


CALLS = {
    "selective_scan": Call(
        selective_scan,
        lambda B, T, D, N: {
            "u": (B, T, D),
            "dt": (B, T, D),
            "A": (D, N),
            "B": (B, T, N),
            "C": (B, T, N),
            "D": (D,),
        },  # fmt: skip
        lambda B, T, D, N: {"y": (B, T, D)},
        flops=lambda B, T, D, N: 6.0 * B * T * D * N,
        exponentials=lambda B, T, D, N: float(B * T * D * N),
    ),
    "linear_attention": Call(
        linear_attention,
        _head_shapes,
        lambda B, T, H, V, **_: {"y": (B, T, H, V)},
        flops=_matrix_flops,
        exponentials=_channel_exponentials,
    ),
    "delta_rule": Call(
        delta_rule,
        lambda **sizes: _head_shapes(**sizes) | {"beta": (sizes["B"], sizes["T"], sizes["H"])},
        lambda B, T, H, V, **_: {"y": (B, T, H, V)},
        flops=_delta_flops,
        exponentials=_channel_exponentials,
    ),
    "linear_recurrence": Call(
        linear_recurrence,
        lambda B, T, D: {"log_a": (B, T, D), "x": (B, T, D)},
        lambda B, T, D: {"h": (B, T, D)},
        flops=lambda B, T, D: 2.0 * B * T * D,
        exponentials=lambda B, T, D: float(B * T * D),
    ),
    "short_convolution": Call(
        short_convolution,
        lambda B, T, D, W: {"x": (B, T, D), "w": (W, D)},
        lambda B, T, D, W: {"y": (B, T, D)},
        flops=lambda B, T, D, W: 2.0 * B * T * D * W,
    ),
    "attention": Call(
        attention,
        lambda B, T, H, G, K, V, **_: {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)},
        lambda B, T, H, V, **_: {"y": (B, T, H, V)},
        flops=lambda K, V, **sizes: 2 * (K + V) * _attention_pairs(**sizes),
        exponentials=_attention_pairs,
        options=lambda window=None, **_: {"window": window},
        training=3.5,
    ),
    "decode_attention": Call(
        decode_attention,
        lambda B, S, H, G, K: {"q": (B, 1, H, K), "k": (B, S, G, K), "v": (B, S, G, K), "lengths": (B,)},
        lambda B, S, H, G, K: {"y": (B, 1, H, K)},
        flops=lambda B, S, H, G, K: 4.0 * B * S * H * K,
        exponentials=lambda B, S, H, G, K: float(B * S * H),
        training=0,
    ),
    "grouped_matmul": Call(
        grouped_matmul,
        lambda M, K, N, E: {"x": (M, K), "w": (E, K, N), "group_sizes": (E,)},
        lambda M, K, N, E: {"y": (M, N)},
        flops=lambda M, K, N, E: 2.0 * M * K * N,
    ),
    "linear_cross_entropy": Call(
        lambda w_head, **others: linear_cross_entropy(w=w_head, **others),
        lambda N, D, V: {"x": (N, D), "w_head": (D, V), "labels": (N,), "weights": (N,)},
        lambda N, D, V: {},
        flops=lambda N, D, V: 2.0 * N * D * V,
        exponentials=lambda N, D, V: float(N * V),
    ),
}
