"""The text of --help. Imports no jax."""

import importlib
from collections.abc import Sequence
from types import ModuleType

VERBS = (
    "train",
    "evaluate",
    "generate",
    "plan",
    "sweep",
    "convert",
    "upcycle",
    "merge",
    "extract",
    "verify",
    "coordinate_check",
    "benchmark",
    "schema",
)

OPTIONS = """\
Options
  --cfg job         print the composed config instead of running
  --config-dir DIR  a folder with further groups and choices; may be given again
  --traceback       show where an error came from
  -h, --help        this text"""


def overview() -> str:
    """All verbs, a line each."""
    lines = [f"  {verb:<16} {importlib.import_module(f'efficient_lm.cli.{verb}').SUMMARY}" for verb in VERBS]
    return "\n".join(
        [
            "Trains efficient language models, straight from a config.",
            "",
            "Usage  efficient-lm VERB [key=value ...] [options]",
            "",
            "Verbs",
            *lines,
            "",
            "`efficient-lm VERB --help` lists what a verb can be told. First steps:",
            "  efficient-lm train experiment=quickstart",
            "  efficient-lm generate checkpoint=runs/quickstart prompt='My fellow citizens'",
        ]
    )


def verb_help(verb: str, module: ModuleType, config_dirs: Sequence[str] = ()) -> str:
    """What a verb does, its keys, its groups with their choices, and examples."""
    parts = [f"{module.SUMMARY}\n\nUsage  efficient-lm {verb} [key=value ...] [options]", module.HELP.strip("\n")]
    if module.ROOT is not None:
        parts.append(_groups(module.ROOT, config_dirs))
    return "\n\n".join(filter(None, [*parts, OPTIONS]))


def _groups(root: str, config_dirs: Sequence[str]) -> str:
    from efficient_lm.composition import ConfigRoots

    roots = ConfigRoots.of(config_dirs)
    defaults = roots.defaults(root)
    if not defaults:
        return ""
    lines = []
    for group, default in sorted(defaults.items(), key=lambda item: item[0] != "experiment"):
        choices = [f"{name}*" if name == default else name for name in roots.choices(group)]
        lines.append(f"  {group + '=':<13}{', '.join(choices)}")
    return "\n".join(["Groups (* is the default; group.key=value sets any value of the choice)", *lines])
