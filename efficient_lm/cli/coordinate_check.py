"""The verb `coordinate_check`."""

from collections.abc import Sequence

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError

ROOT = "coordinate_check"
SUMMARY = "Trains a model for a few steps at several widths: do its activations stay of one size? (muP)"
HELP = """
Takes every key of `train` but model.width, and
  widths=            of the models, [64,128,256,512]
  steps=             of training, all at the full learning rate
  seeds=             models of each width, averaged
  tolerance=         slope over the width, in logarithms, above which a change grows
  output=            folder for coordinates.json and coordinates.png

Exit status 0: what training changes stays of one size; 1: it grows with the width.

Examples
  efficient-lm coordinate_check parameterization=mup parameterization.base_width=64
  efficient-lm coordinate_check model=moe_tiny widths=[64,128,256] optimizer.learning_rate=1e-2
"""


def run(overrides: Sequence[str], options: Options) -> int:
    """Check the model that `overrides` compose. Returns 0 where its activations stay of one size, and 1 otherwise."""
    from efficient_lm.composition import compose
    from efficient_lm.config import RunConfig
    from efficient_lm.training.coordinates import CoordinateCheckSpec, check_coordinates, table, write
    from efficient_lm.validation import validate

    if any(override.lstrip("+").split("=")[0] == "model.width" for override in overrides):
        raise ConfigError("model.width: is each of widths=[...] in turn; leave it out")

    def composed(more: Sequence[str] = ()) -> tuple[dict, dict]:
        values = compose(ROOT, [*overrides, *more], options.config_dirs).values
        return {name: values.pop(name) for name in CoordinateCheckSpec.keys() if name in values}, values

    spec = validate(CoordinateCheckSpec, composed()[0])
    configs = [validate(RunConfig, composed([f"model.width={width}"])[1]) for width in spec.widths]
    found = check_coordinates(spec, configs)
    kind, optimizer = configs[0].parameterization.kind, configs[0].optimizer
    title = f"{kind}, {optimizer.kind} at {optimizer.learning_rate:g}"
    folder = write(found, spec, title)
    growing = found.growing(spec.tolerance)
    print(f"{title}, after {spec.steps} steps\n\n{table(found)}\n\n{_verdict(growing)}\n{folder}/coordinates.png")
    return 1 if growing else 0


def _verdict(growing: dict[str, float]) -> str:
    if not growing:
        return "what training changes stays of one size"
    return "grows with the width: " + ", ".join(f"{name} (slope {slope:+.2f})" for name, slope in growing.items())
