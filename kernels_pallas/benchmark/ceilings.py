"""What a chip can do at most, from its data sheet: the bounds that achieved figures are held against."""

from typing import NamedTuple


class Ceiling(NamedTuple):
    """Dense bfloat16 FLOP/s, bytes/s of main memory, and exponentials/s (None where it is not known)."""

    flops: float
    bytes: float
    exponentials: float | None = None


CEILINGS = {
    "NVIDIA A100": Ceiling(312e12, 2.04e12),
    "NVIDIA B200": Ceiling(2250e12, 8.0e12),
    "NVIDIA H100": Ceiling(989e12, 3.35e12, 3.9e12),
    "NVIDIA H200": Ceiling(989e12, 4.8e12, 3.9e12),
    "TPU v4": Ceiling(275e12, 1.23e12),
    "TPU v5 lite": Ceiling(197e12, 0.82e12),
    "TPU v5": Ceiling(459e12, 2.77e12),
    "TPU v6 lite": Ceiling(918e12, 1.64e12),
}
"""By the beginning of the device's name. Exponentials: 16 per clock and multiprocessor, 132 of these at 1.83 GHz."""


def ceiling(kind: str) -> Ceiling | None:
    """Of a kind of device as JAX names it; None for one that is not listed, CPUs among them."""
    fitting = [name for name in CEILINGS if kind.startswith(name)]
    return CEILINGS[max(fitting, key=len)] if fitting else None


def matmul_flops(kind: str, dtype: str) -> float | None:
    """FLOP/s of dense matrix products of a type as JAX computes them unless told otherwise; None for a chip not listed.

    Products of float32 are TF32 on NVIDIA GPUs, at half the rate of bfloat16, and one pass of bfloat16 on TPUs.
    """
    most = ceiling(kind)
    if most is None:
        return None
    return most.flops / 2 if dtype == "float32" and kind.startswith("NVIDIA") else most.flops
