"""The verb `benchmark`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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

    from kernels_pallas.benchmark import peers
    from kernels_pallas.benchmark.calls import CALLS

    for key, value in (("op", config.op), ("tune", config.tune)):
        if value is not None and value not in CALLS:
            raise ConfigError(f"{key}: no operator '{value}'; {nearest(value, CALLS)}")
    for peer in config.peers:
        if peer not in (valid := (*peers.OWN, *peers.OTHERS)):
            raise ConfigError(f"peers: no peer '{peer}'; {nearest(peer, valid)}")
    if config.tune is not None:
        return _tune(config)
    for op in [config.op] if config.op else CALLS:
        _race(op, config)


def _chosen(op: str, config: BenchmarkConfig) -> list[Any]:
    from kernels_pallas.benchmark.cases import cases

    found = cases(op, config.shapes, config.dtype)
    chosen = [case for case in found if config.only is None or config.only in case.name]
    if found and not chosen:
        names = [case.name for case in found]
        raise ConfigError(f"only: no case of {op} has '{config.only}' in its name; {nearest(config.only, names)}")
    return chosen


def _race(op: str, config: BenchmarkConfig) -> None:
    from kernels_pallas.benchmark import race

    rows = []
    for case in _chosen(op, config):
        for training in [name == "training" for name in config.passes if name == "forward" or case.call.training]:
            part = race.race(case, config.peers, training, config.rounds)
            kind = "forward and backward" if training else "forward"
            print(f"\n{op}, {case.name}, {case.dtype}, {kind}\n{race.table(part)}", flush=True)
            rows += part
    if config.output is not None and rows:
        path = Path(config.output) / f"{op}_{race.device_name()}_{config.dtype}.json"
        race.save(path, op, rows)
        print(f"\n{path}")


def _tune(config: BenchmarkConfig) -> None:
    from kernels_pallas import tuning
    from kernels_pallas.benchmark.tune import tune

    for case in _chosen(config.tune, config):
        print(f"\n{config.tune}, {case.name}, {case.dtype}")
        try:
            for blocks, found in tune(case, config.rounds):
                shown = f"{found:.3f} ms" if isinstance(found, float) else found
                print(f"  {' '.join(f'{name}={size}' for name, size in blocks.items())}: {shown}", flush=True)
        except ValueError as error:
            raise ConfigError(f"tune={error}") from error
    print(f"\n{tuning.HERE / config.tune / 'tuning.json'}")
