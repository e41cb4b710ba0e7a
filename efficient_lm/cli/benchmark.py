"""The verb `benchmark`."""

from collections.abc import Sequence
from typing import Literal

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError, nearest
from efficient_lm.spec import Count, Listing, Spec

ROOT = "benchmark"
SUMMARY = "Measures operators against other libraries, or finds the block sizes that run fastest."
HELP = """
Main keys
  op=                which operator; all of them if it is not given
  peers=             [pallas,xla,cudnn,tokamax,fla,mamba_ssm,causal_conv1d,torch,reference]
  shapes=            peers, models or tiny; only=T16384 keeps the cases with that in their name
  passes=            [forward,training]
  output=            a folder for the figures, OP_DEVICE.json
  tune=              an operator: measures its kernel's block sizes and writes them to its table

Whatever computes something else than the definition is not timed.

Examples
  efficient-lm benchmark op=attention shapes=peers output=benchmarks/results
  efficient-lm benchmark op=selective_scan peers=[xla,reference] shapes=tiny dtype=float32
  efficient-lm benchmark tune=grouped_matmul
"""


class BenchmarkConfig(Spec):
    """What `configs/benchmark.yaml` explains."""

    op: str | None = None
    peers: Listing[str]
    shapes: Literal["peers", "models", "tiny"] = "models"
    only: str | None = None
    passes: Listing[Literal["forward", "training"]] = ("forward", "training")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: Count = 20
    output: str | None = None
    tune: str | None = None


def run(overrides: Sequence[str], options: Options) -> None:
    """Measure as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.validation import validate

    config = validate(BenchmarkConfig, compose(ROOT, overrides, options.config_dirs).values)

    from kernels_pallas.benchmark import peers, session

    for key, value in (("op", config.op), ("tune", config.tune)):
        if value is not None and value not in session.OPERATORS:
            raise ConfigError(f"{key}: no operator '{value}'; {nearest(value, session.OPERATORS)}")
    for peer in config.peers:
        if peer not in peers.PEERS:
            raise ConfigError(f"peers: no peer '{peer}'; {nearest(peer, peers.PEERS)}")
    try:
        session.run(
            config.op, config.tune, shapes=config.shapes, only=config.only, dtype=config.dtype, peers=config.peers,
            passes=config.passes, rounds=config.rounds, output=config.output,
        )  # fmt: skip
    except session.Unfit as error:
        raise ConfigError(str(error)) from error
