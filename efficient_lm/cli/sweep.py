"""The verb `sweep`."""

from collections.abc import Sequence
from typing import Any

from efficient_lm.cli.main import Options

ROOT = "sweep"
SUMMARY = "Trains many models that differ in what is given several values, and says which is best."
HELP = """
Every key of `train` may have several values, and each combination is a run of its own:
  mixer=attention,mamba2,gla   train.batch_size=8,16   mixer='glob(*)'   model.repeats='range(2,7,2)'
  optimizer.learning_rate='tag(log,interval(1e-4,1e-2))'      for a search
Keys with one value are the same for all.

Main keys of the sweep
  sweep=             a sweep file, configs/sweep/NAME.yaml; the command line goes before it
  name= dir=         of the sweep; dir is runs/sweeps/NAME
  seeds=3            of every arm; or a list
  metric=val_loss    what the table is sorted by
  search=tpe search.trials=40         grid, random, tpe, nsga2; search.objectives=[val_loss,cache_bytes]
  search.pruner=median                stops runs that are behind: none, median, asha, hyperband
  budget={params: 10e6}               makes all arms alike in that: params, flops, flops_per_token, seconds
  launcher= launcher.concurrent=2     where runs are started, and how many at once
  axes= zip= when= exclude= base=     as in a sweep file
  dry_run=true       prints what would run
  retry_failed=true  tries runs that have failed once more; restarts= how often one that was killed goes on

The same command goes on where it was stopped, in as many processes as are started.

Examples
  efficient-lm sweep experiment=quickstart mixer=attention,mamba2,gla optimizer.learning_rate=1e-3,3e-3 seeds=2
  efficient-lm sweep sweep=tiny launcher.concurrent=2
  efficient-lm sweep experiment=quickstart name=rates search=tpe search.trials=20 \\
      optimizer.learning_rate='tag(log,interval(1e-4,1e-1))' search.pruner=median
"""


def compose_job(overrides: Sequence[str], config_dirs: Sequence[str]) -> str:
    """What ``--cfg job`` prints: the sweep as it is understood, as YAML."""
    from efficient_lm.sweeps.config import read_sweep
    from efficient_lm.untrusted import to_yaml

    return to_yaml(read_sweep(overrides, config_dirs)[0].dump())


def run(overrides: Sequence[str], options: Options) -> int:
    """Run the sweep. Returns 128 + a signal's number if one ended it, and the status of a run that failed."""
    from efficient_lm.sweeps.config import read_sweep
    from efficient_lm.sweeps.sweep import run_sweep

    config, axes = read_sweep(overrides, options.config_dirs)
    result = run_sweep(config, axes, options.config_dirs)
    print(told(result), end="")
    if result.stopped_by:
        return 128 + result.stopped_by
    return 1 if any(row.state == "failed" for row in result.rows) else 0


def told(result: Any) -> str:
    """Which runs failed and why, how to go on, and where things are."""
    if not result.rows:
        return ""
    failed = [row for row in result.rows if row.state == "failed"]
    parts = [f"failed: {row.name}: {row.reason} ({result.folder / row.run / 'output.log'})" for row in failed]
    if result.stopped_by:
        parts.append("stopped; the same command goes on")
    elif failed:
        parts.append("retry_failed=true tries these once more")
    parts += [f"table: {result.folder / 'table.csv'}", "next:", f"  efficient-lm report runs={result.folder}"]
    return "\n".join(parts) + "\n"
