"""The verb `verify`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from efficient_lm.cli.main import Options
from efficient_lm.errors import CheckpointError, ConfigError

ROOT = "verify"
SUMMARY = "Audits a run directory, and proves of a config that resuming changes nothing."
HELP = """
Main keys
  run=               a run directory to audit: config, checkpoints, metrics, summary, tokenizer, data, secrets
  steps=             N: trains N steps and N more, and 2 N in one go, and compares losses, parameters and the
                     optimizer's state bit by bit; of the config of run=, or of any keys of `train` (then 4 by default)

Exit status 0: nothing wrong (there may be warnings); 4: a fault.

Examples
  efficient-lm verify run=runs/quickstart
  efficient-lm verify run=runs/quickstart steps=4
  efficient-lm verify experiment=quickstart steps=10 parallelism.mesh.data=2
"""


def run(overrides: Sequence[str], options: Options) -> int:
    """Audit, prove, or both. Returns the status of a checkpoint error if anything is wrong."""
    from efficient_lm.composition import compose
    from efficient_lm.config import RunConfig, VerifyConfig, read_config
    from efficient_lm.overrides import parse
    from efficient_lm.validation import validate

    directory = [parse(text) for text in overrides if text.startswith("run=")]
    rest = [text for text in overrides if not text.startswith("run=")]
    if directory:
        others = [text for text in rest if not text.startswith("steps=")]
        if others:
            raise ConfigError(f"{others[0]}: with run= the run's own config is verified; leave one of them out")
        own = {parse(text).key_or_group: parse(text).value() for text in rest}
        wanted = validate(VerifyConfig, {"run": directory[-1].value(), **own})
        config = None
    else:
        values = compose(ROOT, rest, options.config_dirs).values
        wanted = validate(VerifyConfig, {"steps": values.pop("steps") or 4})
        config = validate(RunConfig, values)

    from efficient_lm.training.group import group
    from efficient_lm.training.run_directory import locate
    from efficient_lm.verification.audit import audit
    from efficient_lm.verification.findings import has_fault, table

    if group() is not None:
        raise ConfigError("verify: looks at what any number of processes saved, but is itself one: start it alone")
    found = [] if wanted.run is None else audit(wanted.run)
    if found:
        print(table(found))
    if wanted.steps is not None:
        from efficient_lm.verification.resume_proof import prove

        config = config or read_config(locate(Path(wanted.run))[0].config)
        with tempfile.TemporaryDirectory(prefix="efficient-lm-verify-") as folder:
            proof = prove(config, wanted.steps, Path(folder))
        print(f"\n{wanted.steps} + {wanted.steps} steps against {2 * wanted.steps} in one go\n{table(proof)}")
        found += proof
    return CheckpointError.status if has_fault(found) else 0
