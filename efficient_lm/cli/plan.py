"""The verb `plan`."""

from collections.abc import Sequence
from typing import Any

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError

ROOT = "plan"
SUMMARY = "Counts parameters, FLOPs and memory of a training config, without allocating anything."
HELP = """
Takes every key of `train`, and
  devices=           so many virtual CPU devices in place of this machine's: what each of them would hold
  shardings=         whether to list where every parameter lives; by default where there are several devices

Examples
  efficient-lm plan experiment=transformer_350m
  efficient-lm plan model.width=1024 model.repeats=24 mixer.heads=16 train.sequence_length=2048
  efficient-lm plan parallelism=fsdp_tensor devices=8
"""


PARTS = {
    "parameters": "parameters, float32",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations, logits, workspace",
}
UNREAD = {"data": {"source": {"kind": "sotu"}}, "tokenizer": {"kind": "bytes"}}
"""Stand in for sections that name no file yet; a plan opens neither."""


def run(overrides: Sequence[str], options: Options) -> None:
    """Count what the config that `overrides` compose would cost."""
    from efficient_lm.composition import compose
    from efficient_lm.config import PlanConfig, RunConfig
    from efficient_lm.validation import validate

    values = compose(ROOT, overrides, options.config_dirs, optional=tuple(UNREAD)).values
    asked = validate(PlanConfig, {key: values.pop(key, None) for key in PlanConfig.model_fields})
    if "tokenizer" not in values and values["model"].get("vocab_size") is None:
        raise ConfigError("model.vocab_size: null takes the tokenizer's, and tokenizer.path is not given; give either")
    config = validate(RunConfig, {**UNREAD, **values})

    import jax

    if asked.devices is not None:
        jax.config.update("jax_num_cpu_devices", asked.devices)
    devices = jax.devices() if asked.devices is None else jax.devices("cpu")[: asked.devices]

    from efficient_lm.training.accounting import plan
    from efficient_lm.training.setup import with_vocabulary

    if config.model.vocab_size is None:
        config = with_vocabulary(config, config.tokenizer.build())
    figures = plan(config, devices)
    _print(config, figures, f"{len(devices)} {devices[0].platform} device(s)")
    if asked.shardings or (asked.shardings is None and len(devices) > 1):
        _print_placements(figures)


def _print(config: Any, figures: dict[str, Any], where: str) -> None:
    train, flops, memory = config.train, figures["flops_per_token"], figures["bytes"]
    rows: list[tuple[str, str]] = [("parameters", "")]
    rows += [(f"  {part}", f"{count:,}") for part, count in figures["parameters"].items()]
    rows += [("FLOPs", "")]
    rows += [(f"  {name} per token", f"{value / 1e6:,.2f} M") for name, value in flops.items()]
    rows += [("  whole run", f"{figures['training_flops']:.3g} for {figures['tokens']:,} tokens")]
    micro = train.batch_size // train.accumulate
    if len(figures["programs"]) > 1:
        rows += [("steps", "")]
        rows += [
            (f"  from {step:,} on", f"{count:,} × {length:,} tokens") for step, count, length in figures["programs"]
        ]
    rows += [(f"memory of a step, {micro} × {train.sequence_length} tokens at a time, on each of {where}", "")]
    rows += [(f"  {shown}", _size(memory[name])) for name, shown in PARTS.items()]
    rows += [("  total", _size(sum(memory[name] for name in PARTS)))]
    rows += [(f"cache of one sequence of {train.sequence_length} tokens", _size(memory["cache_per_sequence"]))]
    width = max(len(name) for name, value in rows if value)
    print("\n".join(f"{name:<{width}}  {value:>18}" if value else name for name, value in rows))


def _print_placements(figures: dict[str, Any]) -> None:
    mesh = " × ".join(f"{axis}={size}" for axis, size in figures["mesh"].items())
    print(f"on each device of {mesh}: parameters, float32, and their optimizer state; axis/what divides it")
    rows = [
        (each.path, " ".join(f"{axis}={size}" for axis, size in zip(each.axes, each.shape, strict=True)), each)
        for each in figures["placements"]
    ]
    width, shape = (max(len(row[column]) for row in rows) for column in (0, 1))
    for path, axes, each in rows:
        print(f"  {path:<{width}}  {axes:<{shape}}  {_size(each.parameter):>10}  {_size(each.optimizer):>10}")


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count} B"
