"""What a chip can do at most, from its data sheet: the bounds that achieved figures are held against."""

from typing import NamedTuple


class Ceiling(NamedTuple):
    """What one chip can do.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        bytes: bytes/s of main memory.
        exponentials: exponentials/s; None where it is not known.
        memory: bytes of main memory; None likewise, as the following.
        link: bytes/s that it sends by one link of its interconnect, of a GPU by all of them to others of its host.
        network: bytes/s that it sends to other hosts.
    """

    flops: float
    bytes: float
    exponentials: float | None = None
    memory: float | None = None
    link: float | None = None
    network: float | None = None


CEILINGS = {
    "NVIDIA A100": Ceiling(312e12, 2.04e12, None, 80e9, 300e9, 25e9),
    "NVIDIA B200": Ceiling(2250e12, 8.0e12, None, 180e9, 900e9, 50e9),
    "NVIDIA H100": Ceiling(989e12, 3.35e12, 3.9e12, 80e9, 450e9, 50e9),
    "NVIDIA H200": Ceiling(989e12, 4.8e12, 3.9e12, 141e9, 450e9, 50e9),
    "TPU v4": Ceiling(275e12, 1.23e12),
    "TPU v5 lite": Ceiling(197e12, 0.82e12, None, 16e9, 50e9),
    "TPU v5": Ceiling(459e12, 2.77e12, None, 95e9, 100e9),
    "TPU v6 lite": Ceiling(918e12, 1.64e12, None, 32e9, 100e9),
}
"""By the beginning of the device's name. Exponentials: 16 per clock and multiprocessor, 132 of these at 1.83 GHz.
Memory in bytes of 10^9, of which a runtime keeps some for itself. Links: of a TPU half of what its data sheet says for
both ways, by four (v5e, v6e) or six ports; of a GPU NVLink one way, and a network card of 400 Gb/s each (A100: 200)."""


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
