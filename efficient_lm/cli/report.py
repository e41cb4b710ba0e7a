"""The verb `report`."""

from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError

ROOT = "report"
SUMMARY = "Makes tables and plots of one or many runs, as a page that holds all it needs and as PNGs."
HELP = """
Main keys
  runs=              a run directory, a sweep, a folder of runs, a pattern ('runs/*'), or [several]
  output=            the folder to write; by default `report` in the one folder that runs= names
  title=             of the page; by default the name of what runs= names

Examples
  efficient-lm report runs=runs/quickstart
  efficient-lm report runs=[runs/a,runs/b] output=comparison
  efficient-lm report runs='runs/*' output=all title='All of them'
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Report as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.sweeps.report.spec import ReportConfig
    from efficient_lm.validation import validate

    config = validate(ReportConfig, compose(ROOT, overrides, options.config_dirs).values)

    from efficient_lm.sweeps.report.sources import find
    from efficient_lm.sweeps.report.write import report

    sources = find(config.named)
    if config.output is None and not (len(sources.folders) == 1 == len(config.named)):
        raise ConfigError("output: a value is needed: runs= names several folders; say where the report goes")
    output = Path(config.output) if config.output is not None else sources.folders[0] / "report"
    names = [Path(name).absolute().name if Path(name).exists() else name for name in config.named]
    title = config.title or ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    files = report(sources, output, title)
    size, others = files[0].stat().st_size / 1e6, ", ".join(file.name for file in files[1:3])
    print(f"{len(sources.runs)} runs: {files[0]} ({size:.1f} MB), {others}, {len(files) - 3} pictures")
